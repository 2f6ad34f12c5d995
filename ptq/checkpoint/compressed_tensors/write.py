"""Writing a checkpoint in the compressed-tensors format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.checkpoint.atomic import replacing
from ptq.checkpoint.compressed_tensors.groups import layout_for, quantization_config
from ptq.checkpoint.compressed_tensors.layer import stored_tensors
from ptq.checkpoint.compressed_tensors.limits import check_format, check_kinds, check_vllm
from ptq.checkpoint.compressed_tensors.read import read
from ptq.checkpoint.shard import Elsewhere, dtype_name
from ptq.checkpoint.shards import write_shards
from ptq.checkpoint.side_files import copy_files, write_configs
from ptq.checkpoint.target import check_target
from ptq.checkpoint.tensors import distinct_tensors
from ptq.errors import CheckpointError, UnsupportedError
from ptq.kv_cache import cache_settings
from ptq.modules import QuantLinear, quantized_modules

Engine = Literal["vllm", "transformers"]
Scales = Literal["model", "keep"]


def write(
    model: nn.Module,
    directory: str | Path,
    *,
    engine: Engine = "vllm",
    scales: Scales = "model",
    tokenizer: Any = None,
    shard_bytes: int = 5_000_000_000,
    carried: Mapping[str, Path] | None = None,
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

    Returns:
        What was changed, in words; empty if nothing was.

    Raises:
        UnsupportedError: a layer cannot be held or loaded; it is named, with the remedy.
        CheckpointError: nothing is quantized, the directory cannot be used, the disk is full, or
            what was written reads back as something else.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{type(model).__name__} is no transformers model, which compressed-tensors needs; "
            "save it with ptq.save"
        )
    layers = check_format(quantized_modules(model))
    if not layers:
        raise CheckpointError(f"nothing in this {type(model).__name__} is quantized")
    check_kinds(model, layers)
    if engine == "vllm":
        check_vllm(model, layers)
    dtype = _model_dtype(model) if scales == "model" else None
    notes = _rounded(layers, dtype)
    tensors, elsewhere = _tensors(model, layers, dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    target = check_target(directory, False, total)
    config = quantization_config({n: m.scheme for n, m in layers.items()}, _float_linears(model))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target, False) as tmp:
            write_configs(model, tmp, config)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(tmp))
            copy_files(carried or {}, tmp)
            write_shards(tensors, tmp, shard_bytes, total, elsewhere)
            _check_read_back(layers, read(tmp), dtype)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {target} ({total / 1e6:,.0f} MB) could not be written: {error}; "
            "free some space, or choose another directory"
        ) from error
    if cache_settings(model) is not None:
        notes.append("left out: the quantized key-value cache, which only ptq has")
    return notes


def _model_dtype(model: PreTrainedModel) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _rounded(layers: Mapping[str, QuantLinear], dtype: torch.dtype | None) -> list[str]:
    """What storing the scales in another dtype changes.

    Raises:
        UnsupportedError: a scale becomes zero or infinite; the layer is named.
    """
    worst, count = 0.0, 0
    for name, layer in layers.items():
        for scale in (layer.scale, layer.input_scale):
            if dtype is None or scale is None:
                continue
            stored = scale.to(dtype).double()
            if not bool(stored.isfinite().all()) or bool((stored == 0).any()):
                raise UnsupportedError(
                    f"layer {name} has scales that {dtype_name(dtype)}, the model's dtype, cannot "
                    "hold; store them as they are: --scales keep"
                )
            change = float(((stored - scale.double()) / scale.double()).abs().max())
            worst, count = max(worst, change), count + (change > 0)
    if not count or dtype is None:
        return []
    return [
        f"scales rounded to {dtype_name(dtype)}, the model's dtype, in {count} tensors, by up to "
        f"{worst:.2%}; --scales keep stores them as they are"
    ]


def _tensors(
    model: PreTrainedModel, layers: Mapping[str, QuantLinear], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Elsewhere]:
    """All tensors by their names in the file; those of the layers on the meta device, and what
    makes their values."""
    own = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    own -= {f"{name}.bias" for name in layers}
    found, aliases = distinct_tensors(model)
    tied = model.all_tied_weights_keys
    found |= {key: found[source] for key, source in aliases.items() if key not in tied}
    tensors = {key: tensor for key, tensor in found.items() if key not in own}
    elsewhere = {}
    for name, layer in layers.items():
        made = stored_tensors(layer.quantized_weight, layout_for(layer.scheme), dtype)
        for key, (empty, values) in made.items():
            tensors[f"{name}.{key}"] = empty
            elsewhere[f"{name}.{key}"] = values
    return tensors, elsewhere


def _float_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _check_read_back(
    layers: Mapping[str, QuantLinear], loaded: nn.Module, dtype: torch.dtype | None
) -> None:
    """Whether every layer has the codes and zero points that it had, and the scales as stored."""
    found = quantized_modules(loaded)
    for name in (*layers, *found):
        if name not in layers or name not in found:
            raise CheckpointError(f"layer {name} does not read back as it was written")
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            wanted = tensor
            if dtype is not None and key in ("scale", "input_scale"):
                wanted = tensor.to(dtype).to(torch.float32 if key == "input_scale" else dtype)
            if not torch.equal(wanted.cpu(), found[name].state_dict()[key]):
                raise CheckpointError(f"tensor {name}.{key} does not read back as it was written")
