"""Sentences of a text, which is what encoders of text are for."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from ptq.calibrate.sources import load_documents
from ptq.calibrate.tokens import TokenSet, token_set
from ptq.config import EvaluationConfig
from ptq.errors import CalibrationError

_SHORTEST = 20  # characters


def split_sentences(texts: Sequence[str]) -> list[str]:
    """Lines, and pieces between full stops, of at least 20 characters, each once, in order."""
    pieces = (p.strip() for text in texts for p in re.split(r"(?<=[.!?])\s+|\n", text))
    return list(dict.fromkeys(piece for piece in pieces if len(piece) >= _SHORTEST))


def evaluation_sentences(config: EvaluationConfig, tokenizer: Any) -> TokenSet:
    """The first sentences of the text, with the tokenizer's special tokens, each cut to ``context``
    tokens; as many as ``windows * context`` tokens hold.

    Raises:
        CalibrationError: there are fewer than two.
    """
    documents = load_documents(
        config.data, subset=config.subset, split=config.split, column=config.column
    )
    sequences: list[torch.Tensor] = []
    left = config.windows * config.context
    for sentence in split_sentences([d.text for d in documents if d.text is not None]):
        ids = tokenizer(sentence, truncation=True, max_length=config.context)["input_ids"]
        left -= len(ids)
        if left < 0:
            break
        sequences.append(torch.tensor(ids, dtype=torch.int64))
    if len(sequences) < 2:
        raise CalibrationError(
            f"evaluation text {', '.join(config.data)} gives {len(sequences)} sentences of "
            f"{_SHORTEST} characters or more within {config.windows} x {config.context} tokens, "
            "two are needed; give more text, or raise evaluation.windows"
        )
    return token_set(sequences, len(documents), config.data)
