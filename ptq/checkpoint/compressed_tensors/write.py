"""Writing a checkpoint in the compressed-tensors format."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ptq.checkpoint.compressed_tensors.groups import layout_for, quantization_config
from ptq.checkpoint.compressed_tensors.layer import stored_tensors
from ptq.checkpoint.compressed_tensors.limits import check_format, check_transformers
from ptq.checkpoint.compressed_tensors.read import read
from ptq.checkpoint.foreign_names import all_names, kept_float
from ptq.checkpoint.foreign_write import ForeignFormat, Made, write_foreign
from ptq.checkpoint.vllm import Loads, check_vllm
from ptq.checkpoint.written import Verify
from ptq.config import Scheme
from ptq.core import QuantizedWeight
from ptq.model import FileNames
from ptq.modules import QuantLinear

Engine = Literal["vllm", "transformers"]
Scales = Literal["model", "keep"]
_VLLM = Loads(symmetric=(4, 8), asymmetric=(4,), int8=True, tiles=True)


def write(
    model: nn.Module,
    directory: str | Path,
    *,
    engine: Engine = "vllm",
    scales: Scales = "model",
    tokenizer: Any = None,
    shard_bytes: int = 5_000_000_000,
    carried: Mapping[str, Path] | None = None,
    verify: Verify = "files",
) -> list[str]:
    """Write a quantized transformers model as compressed-tensors, its codes bit for bit.

    The directory appears whole, read back and compared, or not at all; nothing is overwritten.

    Args:
        engine: whose limits are checked: vLLM's, or only what the format itself can hold.
        scales: ``model``: stored in the model's dtype, which is what readers of the format
            compute with (float32 ones are rounded if that is a 16-bit dtype); ``keep``: as they
            are, so that reading gives the same bits.
        tokenizer: a transformers tokenizer or processor to carry along.
        carried: name in the checkpoint to a file that is copied as it is.
        verify: ``process``: besides, a fresh process loads it and computes the same outputs.

    Returns:
        What was changed, in words; empty if nothing was.

    Raises:
        UnsupportedError: a layer cannot be held or loaded; it is named, with the remedy.
        CheckpointError: nothing is quantized, the directory cannot be used, the disk is full, or
            what was written reads back as something else.
    """
    return write_foreign(
        _FORMAT,
        model,
        directory,
        engine=engine,
        scales=scales,
        tokenizer=tokenizer,
        shard_bytes=shard_bytes,
        carried=carried,
        verify=verify,
    )


def _check(model: PreTrainedModel, layers: Mapping[str, QuantLinear], engine: str) -> None:
    if engine == "vllm":
        check_vllm(model, layers, _VLLM)
    else:
        check_transformers(model, layers)


def _stored(layer: QuantLinear, weight: QuantizedWeight, dtype: torch.dtype | None) -> Made:
    return stored_tensors(weight, layout_for(layer.scheme), dtype)


def _config(
    model: PreTrainedModel,
    layers: Mapping[str, QuantLinear],
    _parts: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    return quantization_config(_targets(model, layers), kept_float(model))


def _targets(model: nn.Module, layers: Mapping[str, QuantLinear]) -> dict[str, Scheme]:
    """The scheme of each layer, by all its names. transformers takes a group for that of experts if
    its targets are expressions that say so."""
    names = FileNames(model)
    found = {}
    for name, layer in layers.items():
        for target in all_names(names, name):
            expert = len(names.parts(name)) > 1 or ".experts." in target
            found[f"re:^{re.escape(target)}$" if expert else target] = layer.scheme
    return found


def _scale_dtype(
    model: PreTrainedModel, _layers: Mapping[str, QuantLinear], scales: str
) -> torch.dtype | None:
    """The model's dtype, or that which the scales have."""
    if scales == "keep":
        return None
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


_FORMAT = ForeignFormat(
    name="compressed-tensors",
    conv="choose --format gptq (weights alone), or keep the ptq format",
    held=check_format,
    check=_check,
    scale_dtype=_scale_dtype,
    whose=("the model's dtype", "--scales keep"),
    stored=_stored,
    config=_config,
    read=read,
)
