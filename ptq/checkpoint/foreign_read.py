"""What reading the formats of other toolkits has in common: the float model of config.json, a check
that every tensor has a place, and a QuantLinear in the place of each quantized layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.checkpoint.declare import declare_quantized
from ptq.checkpoint.foreign_files import ForeignFiles
from ptq.checkpoint.from_config import generation_config, load_config, model_of
from ptq.checkpoint.manifest import GENERATION_CONFIG
from ptq.checkpoint.native_read import assign
from ptq.checkpoint.paths import inside
from ptq.checkpoint.shard import Stored, dtype_name, read_header, read_tensors
from ptq.config import Scheme
from ptq.core import QuantizedWeight, join_rows
from ptq.errors import CheckpointError, PTQError, UnsupportedError
from ptq.model import fill_computed_buffers, replace_module
from ptq.modules import QuantLinear, buffers_of, share_inputs

_COMPUTED = "rotary_emb.inv_freq"
"""What older versions of transformers stored, and the model computes."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Expected:
    """A tensor that a layer must have: one of these dtypes, this shape."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]
    optional: bool = False


Read = tuple[QuantizedWeight, Scheme]


@dataclass(frozen=True)
class ForeignLayer:
    """A quantized layer as a format stores it, in one part or in several of equally many rows.

    Args:
        linear: the float layer, whose place it takes.
        expected: the tensors of each part, by the last part of their names.
        made: the weight of these tensors (those that are optional may be missing) and its scheme.
    """

    linear: nn.Linear
    expected: Mapping[str, Expected]
    made: Callable[[Mapping[str, Tensor]], Read]


def empty_model(root: Path) -> PreTrainedModel:
    """The float model of a directory's config.json, without values.

    Raises:
        UnsupportedError: transformers does not have its class.
    """
    config = load_config(root)
    stored = sum(len(read_header(inside(root, p.name))) for p in root.glob("*.safetensors"))
    return model_of(root, config, f"model of the class {config.architectures}", stored)


def plain_linear(name: str, module: nn.Module) -> nn.Linear:
    """The module, which is a plain linear layer.

    Raises:
        CheckpointError: it is something else.
    """
    if type(module) is not nn.Linear:
        raise CheckpointError(
            f"layer {name} is a quantized {type(module).__name__}; ptq loads plain linear layers"
        )
    return module


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, which has numbers only.

    Raises:
        CheckpointError: it has infinities or NaNs.
    """
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{name} has values that are not finite; the file is damaged")
    return tensor


def filled(
    files: ForeignFiles,
    model: nn.Module,
    layers: Mapping[str, ForeignLayer],
    device: torch.device,
) -> nn.Module:
    """The model with the quantized layers in it and all tensors of the files, in eval mode.

    Raises:
        CheckpointError: a tensor is missing, left over, damaged or of another shape or dtype.
        UnsupportedError: ptq has no such layer; it is named.
    """
    kept = model.state_dict().keys()
    found = {
        path: {k: s for k, s in header.items() if k in kept or not k.endswith(_COMPUTED)}
        for path, header in files.shards.items()
    }
    stored = {k: s for held in found.values() for k, s in held.items()}
    aliases = _check_fit(model, layers, files, stored)
    tensors = {
        key: tensor.to(device)
        for path, header in found.items()
        for key, tensor in read_tensors(path, header)
    }
    for name, layer in layers.items():
        _place(model, name, layer, files.parts_of(name), tensors)
    for name in files.parts.keys() - layers.keys():
        _join_float(name, files.parts_of(name), tensors)
    share_inputs(model)
    assign(model, tensors, aliases)
    fill_computed_buffers(model, device)
    if isinstance(model, PreTrainedModel) and (files.root / GENERATION_CONFIG).is_file():
        model.generation_config = generation_config(files.root)
    declare_quantized(model)
    return model.to(device).eval()


def _check_fit(
    model: nn.Module,
    layers: Mapping[str, ForeignLayer],
    files: ForeignFiles,
    stored: Mapping[str, Stored],
) -> dict[str, str]:
    """Whether every tensor has a place and every place a tensor; returns those that are tied."""
    wanted = {
        f"{part}.{key}": expected
        for name, layer in layers.items()
        for part in files.parts_of(name)
        for key, expected in layer.expected.items()
    }
    ours = {f"{name}.weight" for name in layers}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        dtypes = FLOATS if tensor.is_floating_point() else (tensor.dtype,)
        parts = files.parts.get(owner)
        if key in ours:
            continue
        if parts is None:
            wanted[key] = Expected(dtypes, tuple(tensor.shape))
        else:
            shape = (tensor.shape[0] // len(parts), *tensor.shape[1:])
            wanted.update({f"{part}.{leaf}": Expected(dtypes, shape) for part in parts})
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    aliases = {k: s for k, s in tied.items() if k in wanted and k not in stored and s in stored}
    for key in (*wanted, *stored):
        if key in aliases:
            continue
        if key not in stored:
            if wanted[key].optional:
                continue
            raise CheckpointError(f"tensor {key}, which the model needs, is not in the checkpoint")
        if key not in wanted:
            raise CheckpointError(f"tensor {key} of the checkpoint has no place in the model")
        _check_kind(key, wanted[key], stored[key])
    return aliases


def _check_kind(key: str, wanted: Expected, found: Stored) -> None:
    if found.dtype not in wanted.dtypes or found.shape != wanted.shape:
        names = " or ".join(map(dtype_name, wanted.dtypes))
        raise CheckpointError(
            f"tensor {key} is {dtype_name(found.dtype)} {list(found.shape)} in the checkpoint, "
            f"but the model needs {names} {list(wanted.shape)}"
        )


def _place(
    model: nn.Module,
    name: str,
    layer: ForeignLayer,
    parts: tuple[str, ...],
    tensors: dict[str, Tensor],
) -> None:
    """Put an empty QuantLinear in the layer's place, and its tensors in that of the stored ones."""
    read, biases = [], []
    for part in parts:
        own = {key: tensors.pop(f"{part}.{key}", None) for key in layer.expected}
        held = own.pop("bias", None)
        biases.append(tensors.pop(f"{part}.bias", None) if held is None else held)
        try:
            read.append(layer.made({key: t for key, t in own.items() if t is not None}))
        except PTQError as error:
            raise type(error)(f"layer {part}: {error}") from None
    weight, scheme = _joined(name, parts, read)
    found = [bias for bias in biases if bias is not None]
    bias = torch.cat(found) if len(found) == len(parts) else None
    if bias is not None and (layer.linear.bias is not None or bool(bias.any())):
        tensors[f"{name}.bias"] = bias
    else:
        bias = None  # zeros, which some writers give to layers without bias
    rows, columns = weight.shape
    empty = QuantLinear.on_meta(columns, rows, scheme, None if bias is None else bias.dtype)
    replace_module(model, name, empty)
    made: dict[str, Any] = buffers_of(weight)
    tensors.update({f"{name}.{key}": t for key, t in made.items() if t is not None})


def _joined(name: str, parts: tuple[str, ...], read: list[Read]) -> Read:
    """The layer that the files have as these parts.

    Raises:
        UnsupportedError: they are quantized in different ways.
    """
    weights = [scheme.weights for _, scheme in read]
    symmetric = all(w.symmetric for w in weights)
    signed = symmetric and any(w.signed_scale for w in weights)
    alike = {"symmetric": symmetric, "signed_scale": signed}
    schemes = [
        scheme.model_copy(update={"weights": scheme.weights.model_copy(update=alike)})
        for _, scheme in read
    ]
    problem = None if all(s == schemes[0] for s in schemes) else "they have different schemes"
    if problem is None:
        try:
            return join_rows([weight for weight, _ in read]), schemes[0]
        except ValueError as error:
            problem = str(error)
    raise UnsupportedError(
        f"layers {' and '.join(parts)} are one layer, {name}, in the model that transformers "
        f"builds, but {problem}, which ptq cannot load; quantize again with one scheme for them, "
        "and scales per channel or group"
    )


def _join_float(name: str, parts: tuple[str, ...], tensors: dict[str, Tensor]) -> None:
    """Put the tensors of a float layer's parts together."""
    for leaf in ("weight", "bias"):
        found = [tensors.pop(f"{part}.{leaf}", None) for part in parts]
        own = [tensor for tensor in found if tensor is not None]
        if own:
            tensors[f"{name}.{leaf}"] = torch.cat(own)
