"""Writing a GPTQ or AWQ checkpoint."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ptq.checkpoint.foreign_names import kept_float
from ptq.checkpoint.foreign_write import ForeignFormat, write_foreign
from ptq.checkpoint.packed_int32.layer import KEPT_DTYPES, SCALE_DTYPE, stored_tensors
from ptq.checkpoint.packed_int32.limits import (
    VLLM,
    block_list,
    check_format,
    check_model,
    check_transformers,
    method_of_layout,
)
from ptq.checkpoint.packed_int32.read import read
from ptq.checkpoint.packed_int32.settings import BITS, LayoutName
from ptq.checkpoint.shard import dtype_name
from ptq.checkpoint.vllm import check_vllm
from ptq.checkpoint.written import Verify
from ptq.errors import UnsupportedError
from ptq.modules import QuantLinear

LAYOUTS: tuple[LayoutName, ...] = tuple(BITS)
_ELSEWHERE = "--format compressed-tensors --scales keep"


def write(
    model: nn.Module,
    directory: str | Path,
    layout: LayoutName,
    *,
    engine: Literal["vllm", "transformers"] = "vllm",
    scales: Literal["model", "keep"] = "model",
    tokenizer: Any = None,
    shard_bytes: int = 5_000_000_000,
    carried: Mapping[str, Path] | None = None,
    verify: Verify = "files",
) -> list[str]:
    """Write a quantized transformers model as GPTQ or AWQ, its codes and zero points bit for bit.

    The directory appears whole, read back and compared, or not at all; nothing is overwritten.

    Args:
        layout: ``gptq`` (version 1, which stores zero points less one), ``gptq-v2`` or ``awq``.
        engine: whose limits are checked: vLLM's, or only those of transformers with GPTQModel.
        scales: ``model``: stored as float16, which every reader takes; ``keep``: as they are,
            which is refused if they are float32.
        tokenizer: a transformers tokenizer or processor to carry along.
        carried: name in the checkpoint to a file that is copied as it is.
        verify: ``process``: besides, a fresh process loads it and computes the same outputs.

    Returns:
        What was changed, and what to know, in words; empty if nothing.

    Raises:
        UnsupportedError: a layer cannot be held or loaded; it is named, with the remedy.
        CheckpointError: nothing is quantized, the directory cannot be used, the disk is full, or
            what was written reads back as something else.
    """
    return write_foreign(
        _format(layout),
        model,
        directory,
        engine=engine,
        scales=scales,
        tokenizer=tokenizer,
        shard_bytes=shard_bytes,
        carried=carried,
        verify=verify,
    )


def _format(layout: LayoutName) -> ForeignFormat:
    return ForeignFormat(
        name=layout,
        conv="choose --format gptq, or keep the ptq format" if layout == "awq" else None,
        held=partial(check_format, layout=layout),
        check=partial(_check, layout=layout),
        scale_dtype=partial(_scale_dtype, layout=layout),
        whose=("the format's dtype", _ELSEWHERE),
        stored=lambda _, weight, dtype: stored_tensors(weight, layout, dtype),
        config=partial(_config, layout=layout),
        read=read,
        to_know=partial(_to_know, layout=layout),
    )


def _check(
    model: PreTrainedModel, layers: Mapping[str, QuantLinear], engine: str, *, layout: LayoutName
) -> None:
    check_model(model, layers, layout)
    if engine == "vllm":
        check_vllm(model, layers, VLLM[method_of_layout(layout)])
    else:
        check_transformers(model, layers, layout)


def _scale_dtype(
    _model: PreTrainedModel, layers: Mapping[str, QuantLinear], scales: str, *, layout: LayoutName
) -> torch.dtype | None:
    if scales == "keep":
        _check_scales(layers, layout)
        return None
    return SCALE_DTYPE


def _check_scales(layers: Mapping[str, QuantLinear], layout: LayoutName) -> None:
    for name, layer in layers.items():
        if layer.scale.dtype not in KEPT_DTYPES:
            raise UnsupportedError(
                f"layer {name} has {dtype_name(layer.scale.dtype)} scales, {layout} has 16-bit "
                f"ones; round them (--scales model), or choose {_ELSEWHERE}"
            )


def _to_know(layers: Mapping[str, QuantLinear], layout: LayoutName) -> list[str]:
    notes = []
    negative = sum(bool((layer.scale < 0).any()) for layer in layers.values())
    if negative:
        notes.append(
            f"{negative} layers have negative scales (signed_scale): readers that dequantize take "
            "them; vLLM does with 16-bit inputs, but not with VLLM_MARLIN_INPUT_DTYPE=int8"
        )
    if layout == "gptq" and not _all_symmetric(layers):
        notes.append(
            "GPTQModel.load takes asymmetric version 1 from itself only, transformers takes this; "
            "both take --format gptq-v2"
        )
    return notes


def _all_symmetric(layers: Mapping[str, QuantLinear]) -> bool:
    return all(layer.zero_point is None for layer in layers.values())


def _config(
    model: PreTrainedModel,
    layers: Mapping[str, QuantLinear],
    parts: Mapping[str, tuple[str, ...]],
    layout: LayoutName,
) -> dict[str, Any]:
    """The ``quantization_config`` of these layers."""
    weights = next(iter(layers.values())).scheme.weights
    common: dict[str, Any] = {
        "bits": weights.int_format.bits,
        "group_size": -1 if weights.group_size is None else weights.group_size,
    }
    kept = kept_float(model)
    if layout == "awq":
        return {
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
            **common,
            "modules_to_not_convert": kept,
        }
    blocks = block_list(model, layers)
    found = {
        "quant_method": "gptq",
        "checkpoint_format": {"gptq": "gptq", "gptq-v2": "gptq_v2"}[layout],
        "desc_act": any(layer.scheme.input_order for layer in layers.values()),
        "sym": _all_symmetric(layers),
        "lm_head": False,
        **common,
        "block_name_to_quantize": blocks,
    }
    inside = [name for name in kept if name.startswith(f"{blocks}.")]
    if inside:  # optimum's way of leaving layers out, and that of GPTQModel and vLLM
        found["modules_in_block_to_quantize"] = [[part for name in layers for part in parts[name]]]
        found["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in inside}
    return found
