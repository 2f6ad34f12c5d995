"""Reading a checkpoint in the compressed-tensors format, whoever wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.checkpoint.compressed_tensors.groups import (
    Group,
    Layout,
    group_of,
    layout_of,
    parse_groups,
    scheme_of,
)
from ptq.checkpoint.compressed_tensors.layer import Expected, expected_tensors, read_weight
from ptq.checkpoint.declare import declare_quantized
from ptq.checkpoint.foreign import quantization_of
from ptq.checkpoint.manifest import CONFIG, GENERATION_CONFIG
from ptq.checkpoint.native_read import (
    assign,
    generation_config,
    load_config,
    usable_device,
)
from ptq.checkpoint.shard import Stored, dtype_name, read_tensors
from ptq.checkpoint.shard_index import find_shards
from ptq.errors import CheckpointError, PTQError, UnsupportedError
from ptq.model import fill_computed_buffers, replace_module, skeleton
from ptq.modules import QuantLinear, buffers_of, share_inputs


@dataclass(frozen=True)
class _Layer:
    """A quantized layer of the model: its group, its layout, the tensors it must have."""

    group: Group
    layout: Layout
    linear: nn.Linear
    expected: Mapping[str, Expected]

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.out_features, self.linear.in_features


def read(
    directory: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """The model of a compressed-tensors directory, with QuantLinear layers, in eval mode.

    Codes, scales and zero points are those of the files, bit for bit. The format has no hashes:
    names, shapes, dtypes and the range of the codes are checked, not the bytes.

    Args:
        model: the float model, for what transformers cannot build from config.json. It becomes the
            quantized one.

    Raises:
        CheckpointError: a file or tensor is missing, left over, damaged or of another shape or
            dtype; it is named.
        UnsupportedError: a scheme or layout that ptq does not have; the layer is named.
    """
    root = Path(directory).expanduser()
    device = usable_device(device)
    groups = parse_groups(quantization_of(root), root / CONFIG)
    if model is None:
        model = _empty_model(root)
    layers = {
        name: _layer(name, module, group, layout_of(group, groups, name))
        for name, module in model.named_modules()
        if (group := group_of(groups, name, module)) is not None
    }
    if not layers:
        raise CheckpointError(f"{root / CONFIG} has no group for any layer of the model")
    shards = find_shards(root)
    aliases = _check_fit(model, layers, {k: s for held in shards.values() for k, s in held.items()})
    tensors = {
        key: tensor.to(device)
        for path, header in shards.items()
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


def _empty_model(root: Path) -> PreTrainedModel:
    config = load_config(root)
    names = config.architectures or []
    if not names or not hasattr(transformers, names[0]):
        raise UnsupportedError(
            f"{root} holds a {names[0] if names else 'model without a class'}, which transformers "
            f"{transformers.__version__} does not have; ptq does not run code that comes with a "
            "model (trust_remote_code): build it and pass it: ptq.load(directory, model=...)"
        )
    return skeleton(config)


def _layer(name: str, module: nn.Module, group: Group, layout: Layout) -> _Layer:
    if type(module) is not nn.Linear:
        raise CheckpointError(
            f"layer {name} is a quantized {type(module).__name__}; ptq loads plain linear layers"
        )
    scheme_of(group, name, "float32", False)  # is there one?
    try:
        expected = expected_tensors(group, layout, module.out_features, module.in_features)
    except PTQError as error:
        raise type(error)(f"layer {name}: {error}") from None
    return _Layer(group, layout, module, expected)


def _check_fit(
    model: nn.Module, layers: Mapping[str, _Layer], stored: Mapping[str, Stored]
) -> dict[str, str]:
    """Whether every tensor has a place and every place a tensor; returns those that are tied."""
    wanted = {f"{n}.{key}": e for n, layer in layers.items() for key, e in layer.expected.items()}
    ours = {f"{name}.weight" for name in layers}
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for key, tensor in model.state_dict().items():
        if key not in ours:
            dtypes = floats if tensor.is_floating_point() else (tensor.dtype,)
            wanted[key] = Expected(dtypes, tuple(tensor.shape))
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    aliases = {k: s for k, s in tied.items() if k in wanted and k not in stored and s in stored}
    for key in (*wanted, *stored):
        if key in aliases:
            continue
        if key not in stored:
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


def _place(model: nn.Module, name: str, layer: _Layer, tensors: dict[str, Tensor]) -> None:
    """Put an empty QuantLinear in the layer's place, and its tensors in that of the stored ones."""
    own = {key: tensors.pop(f"{name}.{key}") for key in layer.expected}
    scale = own["weight_scale"]
    scheme = scheme_of(layer.group, name, dtype_name(scale.dtype), bool((scale < 0).any()))
    try:
        weight = read_weight(own, scheme, layer.layout, layer.shape)
    except PTQError as error:
        raise type(error)(f"layer {name}: {error}") from None
    bias = None if layer.linear.bias is None else tensors[f"{name}.bias"].dtype
    rows, columns = layer.shape
    replace_module(model, name, QuantLinear.on_meta(columns, rows, scheme, bias))
    made: dict[str, Any] = buffers_of(weight)
    tensors.update({f"{name}.{key}": t for key, t in made.items() if t is not None})
