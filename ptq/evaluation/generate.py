"""A sample of generated text."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq.errors import ModelError, UnsupportedError


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


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, *, chat: bool = False
) -> Sample:
    """Decode greedily.

    Raises:
        UnsupportedError: the model does not generate.
        ModelError: ``chat`` without a chat template.
    """
    if not isinstance(model, nn.Module) or not _can_generate(model):
        raise UnsupportedError(
            f"{type(model).__name__} does not generate text; remove the generation section"
        )
    if chat:
        if tokenizer.chat_template is None:
            raise ModelError("the tokenizer has no chat template; set generation.chat: false")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    pad = tokenizer.pad_token_id
    start = time.perf_counter()
    tokens = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )
    seconds = time.perf_counter() - start
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return Sample(tokenizer.decode(new, skip_special_tokens=True), len(new), seconds)


def _can_generate(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can())
