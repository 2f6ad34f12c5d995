"""What writing the formats of other toolkits has in common: tensors by name, rounded scales, and a
directory that appears once it reads back as it was written."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.checkpoint.atomic import replacing
from ptq.checkpoint.card import CARD, converted_card
from ptq.checkpoint.foreign_names import float_linears
from ptq.checkpoint.fresh import verify_in_fresh_process
from ptq.checkpoint.shard import Elsewhere, dtype_name
from ptq.checkpoint.shards import write_shards
from ptq.checkpoint.side_files import copy_files, write_configs
from ptq.checkpoint.target import check_target
from ptq.checkpoint.tensors import distinct_tensors
from ptq.checkpoint.written import Verify
from ptq.core import QuantizedWeight, split_rows
from ptq.errors import CheckpointError, UnsupportedError
from ptq.kv_cache import cache_settings, is_scale
from ptq.model import FileNames, is_fused_experts, stands_for, unfolded
from ptq.modules import QuantEmbedding, QuantLinear, quantized_modules

Values = Callable[[], Tensor]
Made = Mapping[str, tuple[Tensor, Values]]
"""A layer's tensors by the last part of their names: each on the meta device, and its values."""


@dataclass(frozen=True)
class ForeignFormat:
    """What a format has of its own in writing it.

    Args:
        name: one of :data:`~ptq.checkpoint.CONVERSIONS`.
        conv: what to do with a quantized Conv1D; None: the format's readers load it.
        held: the layers, if the format can hold each of them.
        check: whether an engine loads the layers.
        scale_dtype: what the scales are rounded to, by ``scales`` of the writer.
        whose: whose dtype that is, and what to do to keep the scales as they are.
        stored: the tensors of a layer's weight, or of rows of it.
        config: ``quantization_config``, of layers and what files call them or their parts.
        read: reads what was written.
        to_know: what a user has to know about the layers, in words.
    """

    name: str
    conv: str | None
    held: Callable[[Mapping[str, QuantLinear | QuantEmbedding]], dict[str, QuantLinear]]
    check: Callable[[PreTrainedModel, Mapping[str, QuantLinear], str], None]
    scale_dtype: Callable[[PreTrainedModel, Mapping[str, QuantLinear], str], torch.dtype | None]
    whose: tuple[str, str]
    stored: Callable[[QuantLinear, QuantizedWeight, torch.dtype | None], Made]
    config: Callable[
        [PreTrainedModel, Mapping[str, QuantLinear], Mapping[str, tuple[str, ...]]], dict[str, Any]
    ]
    read: Callable[[Path], nn.Module]
    to_know: Callable[[Mapping[str, QuantLinear]], list[str]] = lambda layers: []


@dataclass(frozen=True)
class _Checkpoint:
    """A model as a format stores it.

    Args:
        layers: the quantized layers, by name.
        parts: what files call each of them, or its rows if they have it as several.
        stored: the tensors of each part.
        config: ``quantization_config`` of config.json.
        scale_dtype: what the scales were rounded to; None: they are as they were.
    """

    model: PreTrainedModel
    layers: Mapping[str, QuantLinear]
    parts: Mapping[str, tuple[str, ...]]
    stored: Mapping[str, Made]
    config: Mapping[str, Any]
    scale_dtype: torch.dtype | None


@contextmanager
def _as_in_files(model: nn.Module) -> Iterator[None]:
    """Within it, float experts that files have apart are apart in the model as well."""
    names = FileNames(model)
    fused = [name for name, module in model.named_modules() if is_fused_experts(module)]
    with unfolded(model, [f"{name}.0" for name in fused if names.are_apart(name)]):
        yield


def _parts_in_files(model: nn.Module, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What files call these linear layers, or their parts.

    Raises:
        UnsupportedError: files do not have a layer as layers; it is named.
    """
    names = FileNames(model)
    return {name: names.parts(name) for name in layers}


def _stored_parts(
    layers: Mapping[str, QuantLinear],
    parts: Mapping[str, tuple[str, ...]],
    make: Callable[[QuantLinear, QuantizedWeight], Made],
) -> dict[str, Made]:
    """What ``make`` makes of each part of each layer, by the part's name in files."""
    return {
        part: make(layer, weight)
        for name, layer in layers.items()
        for part, weight in zip(
            parts[name], split_rows(layer.quantized_weight, len(parts[name])), strict=True
        )
    }


def _left_out(model: nn.Module) -> list[str]:
    """What only ptq's own format holds, in words."""
    if cache_settings(model) is None:
        return []
    return ["left out: the quantized key-value cache, which only ptq has"]


def lazily(weight: QuantizedWeight, values: Callable[[QuantizedWeight], dict[str, Values]]) -> Made:
    """What ``values`` makes of a weight, and the shapes and dtypes of that (on the meta device)."""
    parts = {f.name: getattr(weight, f.name) for f in fields(weight)}
    empty: dict[str, Any] = {k: v.to("meta") for k, v in parts.items() if isinstance(v, Tensor)}
    shapes = values(replace(weight, **empty))
    return {name: (shapes[name]().to("meta"), value) for name, value in values(weight).items()}


def _rounded_scales(
    layers: Mapping[str, QuantLinear], dtype: torch.dtype | None, why: str, remedy: str
) -> list[str]:
    """What storing the scales in another dtype changes, in words.

    Args:
        dtype: None: nothing is changed.
        why: whose dtype it is, as in ``"the model's dtype"``.
        remedy: what to do to keep them as they are.

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
                    f"layer {name} has scales that {dtype_name(dtype)}, {why}, cannot hold; "
                    f"store them as they are: {remedy}"
                )
            change = float(((stored - scale.double()) / scale.double()).abs().max())
            worst, count = max(worst, change), count + (change > 0)
    if not count or dtype is None:
        return []
    return [
        f"scales rounded to {dtype_name(dtype)}, {why}, in {count} tensors, by up to "
        f"{worst:.2%}; {remedy} stores them as they are"
    ]


def write_foreign(
    form: ForeignFormat,
    model: nn.Module,
    directory: str | Path,
    *,
    engine: str,
    scales: str,
    tokenizer: Any,
    shard_bytes: int,
    carried: Mapping[str, Path] | None,
    verify: Verify,
) -> list[str]:
    """Write a model in a format of another toolkit, read it back and compare; only then it appears.

    Returns:
        What was changed, and what to know, in words.

    Raises:
        UnsupportedError: a layer cannot be held or loaded; it is named, with the remedy.
        CheckpointError: nothing is quantized, the directory cannot be used, the disk is full, or
            what was written reads back as something else.
    """
    model = _transformers_model(model, form.name, form.conv)
    layers = form.held(quantized_modules(model))
    with _as_in_files(model):
        parts = _parts_in_files(model, layers)
        form.check(model, layers, engine)
        dtype = form.scale_dtype(model, layers, scales)
        rounded = _rounded_scales(layers, dtype, *form.whose)
        stored = _stored_parts(layers, parts, lambda layer, w: form.stored(layer, w, dtype))
        config = form.config(model, layers, parts)
        checkpoint = _Checkpoint(model, layers, parts, stored, config, dtype)
        tensors, elsewhere = _tensors(checkpoint)
        total = sum(tensor.nbytes for tensor in tensors.values())
        target = check_target(directory, False, total)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target, False) as tmp:
                write_configs(model, tmp, config)
                if tokenizer is not None:
                    tokenizer.save_pretrained(str(tmp))
                copy_files(carried or {}, tmp)
                write_shards(tensors, tmp, shard_bytes, total, elsewhere)
                loaded = form.read(tmp)
                _check_read_back(checkpoint, loaded)
                if not (tmp / CARD).exists():
                    card = converted_card(model, loaded, form.name, engine, rounded)
                    (tmp / CARD).write_text(card, encoding="utf-8")
                if verify == "process":
                    verify_in_fresh_process(tmp, loaded)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {target} ({total / 1e6:,.0f} MB) could not be written: {error}; "
                "free some space, or choose another directory"
            ) from error
    return [*rounded, *form.to_know(layers), *_left_out(model)]


def _transformers_model(
    model: nn.Module, format_name: str, remedy_for_conv: str | None
) -> PreTrainedModel:
    """The model, which is one of transformers and has quantized layers.

    Args:
        remedy_for_conv: what to do with a quantized Conv1D; None: the format's readers load it.

    Raises:
        UnsupportedError: it is none of transformers, or a layer is of a kind that the format's
            readers do not expect; it is named.
        CheckpointError: nothing in it is quantized.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{type(model).__name__} is no transformers model, which {format_name} needs; "
            "save it with ptq.save"
        )
    modules = quantized_modules(model)
    if not modules:
        raise CheckpointError(f"nothing in this {type(model).__name__} is quantized")
    for name, module in modules.items():
        origin = stands_for(module)
        if origin is not None and remedy_for_conv is not None:
            raise UnsupportedError(
                f"layer {name} is {type(origin).__name__} in the float model, which readers of "
                f"{format_name} leave as it is; {remedy_for_conv}"
            )
    return model


def _tensors(checkpoint: _Checkpoint) -> tuple[dict[str, Tensor], Elsewhere]:
    """All tensors by their names in the file; those of the layers on the meta device, and what
    makes their values."""
    layers, model = checkpoint.layers, checkpoint.model
    own = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    own -= {f"{name}.bias" for name in layers}
    found, aliases = distinct_tensors(model)
    tied = model.all_tied_weights_keys
    found |= {key: found[source] for key, source in aliases.items() if key not in tied}
    names = FileNames(model)
    linears = {*layers, *float_linears(model)}
    tensors = {}
    for key, tensor in found.items():
        owner, _, leaf = key.rpartition(".")
        if key in own or is_scale(key):
            continue
        if owner not in linears:
            tensors[names.in_file(key)] = tensor
            continue
        parts = names.parts(owner)
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            tensors[f"{part}.{leaf}"] = rows
    elsewhere = {}
    for part, made in checkpoint.stored.items():
        for key, (empty, values) in made.items():
            tensors[f"{part}.{key}"] = empty
            elsewhere[f"{part}.{key}"] = values
    return tensors, elsewhere


def _check_read_back(checkpoint: _Checkpoint, loaded: nn.Module) -> None:
    """Whether every layer has the codes and zero points that it had, and the scales as stored."""
    layers, dtype = checkpoint.layers, checkpoint.scale_dtype
    found = quantized_modules(loaded)
    for name in (*layers, *found):
        if name not in layers or name not in found:
            raise CheckpointError(f"layer {name} does not read back as it was written")
    for name, layer in layers.items():
        back = found[name].state_dict()
        for key, tensor in layer.state_dict().items():
            wanted = tensor
            if dtype is not None and key in ("scale", "input_scale"):
                wanted = tensor.to(dtype).to(torch.float32 if key == "input_scale" else dtype)
            if key not in back and key == "zero_point" and not bool(tensor.any()):
                continue  # all in the middle: read as symmetric
            if key not in back and key == "input_order" and _is_sorted(tensor):
                continue  # as rounding to nearest leaves it: read as no order
            if key not in back or not torch.equal(wanted.cpu(), back[key]):
                raise CheckpointError(f"tensor {name}.{key} does not read back as it was written")


def _is_sorted(order: Tensor) -> bool:
    return bool((order.diff() > 0).all())
