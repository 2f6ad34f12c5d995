"""A sample of generated text."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.errors import CalibrationError, ModelError, UnsupportedError


@dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt.

    Args:
        text: the new tokens only.
        seconds: for prompt and new tokens together.
    """

    text: str
    new_tokens: int
    seconds: float


def encode_prompt(prompt: str, tokenizer: Any, *, chat: bool = False) -> Tensor:
    """Token ids [1, T] of the prompt.

    Args:
        chat: wrap it in the tokenizer's chat template.

    Raises:
        ModelError: no tokenizer, or ``chat`` without a chat template.
        CalibrationError: the prompt has no tokens.
    """
    if tokenizer is None:
        raise ModelError("generation needs a tokenizer, and the model comes without one")
    text = prompt
    if chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelError("the tokenizer has no chat template; set generation.chat: false")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    found = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
    if found["input_ids"].numel() == 0:
        raise CalibrationError(f"generation.prompt {prompt!r} has no tokens; give another")
    ids: Tensor = found["input_ids"].long()
    return ids


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: Tensor, max_new_tokens: int) -> Sample:
    """Decode greedily.

    Args:
        prompt: token ids [1, T] from :func:`encode_prompt`.

    Raises:
        UnsupportedError: the model does not generate.
    """
    require_generation(model)
    prompt = prompt.to(next(model.parameters()).device)
    pad = tokenizer.pad_token_id
    start = time.perf_counter()
    tokens = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )
    seconds = time.perf_counter() - start
    # A decoder repeats the prompt; the decoder of an encoder-decoder begins with a start token.
    new = tokens[0, 1 if model.config.is_encoder_decoder else prompt.shape[1] :]
    return Sample(tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def require_generation(model: Any) -> None:
    """Refuse models without ``generate``.

    Raises:
        UnsupportedError: it has none.
    """
    can = getattr(model, "can_generate", None)
    if not callable(can) or not can():
        raise UnsupportedError(
            f"{type(model).__name__} does not generate text; remove the generation section"
        )
