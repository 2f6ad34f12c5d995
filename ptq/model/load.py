"""The float model and its tokenizer in one call, for notebooks."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from ptq.config import ModelConfig, make_section
from ptq.model.source import ModelSource, load_model
from ptq.model.tokenizer import load_tokenizer


def load_float(
    identifier: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """A float model and its tokenizer (None if it comes without one).

    Args:
        identifier: hub id, local directory, .gguf file, or ``package:NAME/FILE`` for a file in an
            installed Python package.
        dtype: float32, float16, bfloat16, or auto: as stored (GGUF files: float32).

    Raises:
        ConfigError: no such dtype.
        ModelError: not found or unreadable.
        UnsupportedError: the model is already quantized.
    """
    options = make_section(
        ModelConfig,
        "load_float",
        id=os.fspath(identifier),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
    )
    source = ModelSource.resolve(options)
    tokenizer = load_tokenizer(source)
    return load_model(source), tokenizer
