"""The places that a model has for a checkpoint's tensors, and whether the tensors fit."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ptq.checkpoint.manifest import LayerEntry, Manifest
from ptq.checkpoint.shard import DTYPES, dtype_name
from ptq.errors import CheckpointError
from ptq.modules import QuantEmbedding, QuantLinear

_SIZES = {
    "linear": ("in_features", "out_features"),
    "embedding": ("embedding_dim", "num_embeddings"),
}
_BY_NAME = {dtype_name(dtype): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Slot:
    """A place for one tensor; ``exact`` where another dtype would change its meaning.

    A float tensor outside of the quantized layers may have any float dtype: a model is built in
    one dtype, and may have been stored with some of its tensors in another.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    exact: bool


def dtype_named(name: str) -> torch.dtype:
    """``"bfloat16"`` to ``torch.bfloat16``.

    Raises:
        CheckpointError: no checkpoint holds this dtype.
    """
    if name not in _BY_NAME:
        raise CheckpointError(f"the manifest has the unknown dtype {name!r}")
    return _BY_NAME[name]


Quantized = QuantLinear | QuantEmbedding


def empty_layers(model: nn.Module, layers: Mapping[str, LayerEntry]) -> dict[str, Quantized]:
    """A module on the meta device for every quantized one; the model is not changed.

    Raises:
        CheckpointError: the model has no such layer, or one of another size.
    """
    return {name: _empty_layer(model, name, entry) for name, entry in layers.items()}


def _empty_layer(model: nn.Module, name: str, entry: LayerEntry) -> Quantized:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the checkpoint has a quantized layer {name}, but {type(model).__name__} has none; "
            "it is not the model that was saved"
        ) from None
    sizes = _SIZES[entry.kind]
    wanted = (entry.in_features, entry.out_features)
    found = tuple(getattr(module, size, None) for size in sizes)
    if found != wanted:
        raise CheckpointError(
            f"layer {name} is {type(module).__name__} with {', '.join(sizes)} {found} in the "
            f"model, a quantized {entry.kind} layer with {wanted} in the checkpoint; it is not the "
            "model that was saved"
        )
    if entry.kind == "embedding":
        assert isinstance(module, nn.Embedding | QuantEmbedding)
        empty = QuantEmbedding.on_meta(
            entry.out_features, entry.in_features, entry.scheme, module.weight.dtype
        )
        empty.padding_idx = module.padding_idx
        return empty
    bias = None if entry.bias is None else dtype_named(entry.bias)
    return QuantLinear.on_meta(entry.in_features, entry.out_features, entry.scheme, bias)


def slots(model: nn.Module, layers: Mapping[str, Quantized]) -> dict[str, Slot]:
    """The slots of the model as it will be with these layers in it."""
    replaced = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    found: dict[str, Slot] = {}
    prefixes: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        layer = replaced.get(id(module))
        if layer is not None:
            prefixes += (f"{name}.",)
            for key, tensor in layer.state_dict(prefix=f"{name}.").items():
                exact = key != f"{name}.like"  # only says the dtype of an embedding's output
                found[key] = Slot(tensor.dtype, tuple(tensor.shape), exact)
    for key, tensor in model.state_dict().items():
        if not key.startswith(prefixes):
            found[key] = Slot(tensor.dtype, tuple(tensor.shape), not tensor.is_floating_point())
    return found


def check_fit(wanted: Mapping[str, Slot], manifest: Manifest) -> None:
    """Every slot has a tensor and every tensor has a slot, of its shape and dtype.

    Raises:
        CheckpointError: names the first tensor that is missing, left over or of another kind.
    """
    names = {**{key: key for key in manifest.tensors}, **manifest.aliases}
    for key in wanted:
        if key not in names:
            raise CheckpointError(f"tensor {key}, which the model needs, is not in the checkpoint")
    for key, source in names.items():
        entry = manifest.tensors[source]
        slot = wanted.get(key)
        if slot is None:
            raise CheckpointError(f"tensor {key} of the checkpoint has no place in the model")
        dtype = dtype_named(entry.dtype)
        same_kind = dtype == slot.dtype if slot.exact else dtype.is_floating_point
        if entry.shape != slot.shape or not same_kind:
            raise CheckpointError(
                f"tensor {key} is {entry.dtype} {list(entry.shape)} in the checkpoint, "
                f"but the model needs {dtype_name(slot.dtype)} {list(slot.shape)}"
            )
