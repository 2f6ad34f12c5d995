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
from ptq.checkpoint.from_config import generation_config, load_config, model_of
from ptq.checkpoint.manifest import GENERATION_CONFIG
from ptq.checkpoint.native_read import assign
from ptq.checkpoint.shard import Stored, dtype_name, read_tensors
from ptq.config import Scheme
from ptq.core import QuantizedWeight
from ptq.errors import CheckpointError, PTQError
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


@dataclass(frozen=True)
class ForeignLayer:
    """A quantized layer as a format stores it.

    Args:
        linear: the float layer, whose place it takes.
        expected: its tensors, by the last part of their names.
        made: the weight of these tensors (those that are optional may be missing) and its scheme.
    """

    linear: nn.Linear
    expected: Mapping[str, Expected]
    made: Callable[[Mapping[str, Tensor]], tuple[QuantizedWeight, Scheme]]


def empty_model(root: Path) -> PreTrainedModel:
    """The float model of a directory's config.json, without values.

    Raises:
        UnsupportedError: transformers does not have its class.
    """
    config = load_config(root)
    return model_of(root, config, f"model of the class {config.architectures}")


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
    root: Path,
    model: nn.Module,
    layers: Mapping[str, ForeignLayer],
    shards: Mapping[Path, Mapping[str, Stored]],
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
        for path, header in shards.items()
    }
    aliases = _check_fit(model, layers, {k: s for held in found.values() for k, s in held.items()})
    tensors = {
        key: tensor.to(device)
        for path, header in found.items()
        for key, tensor in read_tensors(path, header)
    }
    for name, layer in layers.items():
        _place(model, name, layer, tensors)
    share_inputs(model)
    assign(model, tensors, aliases)
    fill_computed_buffers(model, device)
    if isinstance(model, PreTrainedModel) and (root / GENERATION_CONFIG).is_file():
        model.generation_config = generation_config(root)
    declare_quantized(model)
    return model.to(device).eval()


def _check_fit(
    model: nn.Module, layers: Mapping[str, ForeignLayer], stored: Mapping[str, Stored]
) -> dict[str, str]:
    """Whether every tensor has a place and every place a tensor; returns those that are tied."""
    wanted = {f"{n}.{key}": e for n, layer in layers.items() for key, e in layer.expected.items()}
    ours = {f"{name}.weight" for name in layers}
    for key, tensor in model.state_dict().items():
        if key not in ours:
            dtypes = FLOATS if tensor.is_floating_point() else (tensor.dtype,)
            wanted[key] = Expected(dtypes, tuple(tensor.shape))
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


def _place(model: nn.Module, name: str, layer: ForeignLayer, tensors: dict[str, Tensor]) -> None:
    """Put an empty QuantLinear in the layer's place, and its tensors in that of the stored ones."""
    own = {key: tensors.pop(f"{name}.{key}", None) for key in layer.expected}
    bias = own.pop("bias", None)
    try:
        weight, scheme = layer.made({key: t for key, t in own.items() if t is not None})
    except PTQError as error:
        raise type(error)(f"layer {name}: {error}") from None
    if layer.linear.bias is not None:
        bias = tensors[f"{name}.bias"]
    elif bias is not None and bool(bias.any()):
        tensors[f"{name}.bias"] = bias
    else:
        bias = None  # zeros, which some writers give to layers without bias
    rows, columns = weight.shape
    empty = QuantLinear.on_meta(columns, rows, scheme, None if bias is None else bias.dtype)
    replace_module(model, name, empty)
    made: dict[str, Any] = buffers_of(weight)
    tensors.update({f"{name}.{key}": t for key, t in made.items() if t is not None})
