"""The tensors of a model, those that are shared once."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ptq.checkpoint.shard import DTYPES
from ptq.errors import CheckpointError


def distinct_tensors(
    model: nn.Module, elsewhere: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of ``state_dict()``, and the further names of those that it has twice.

    Two names are one tensor if they are the same elements of the same memory (tied weights, a
    module used twice). Tensors that merely overlap are stored each by itself.

    Args:
        elsewhere: names of tensors on the meta device whose values are in a file; each stands for
            itself.

    Raises:
        CheckpointError: an entry has no values or cannot be stored; it is named.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[object, str] = {}
    for key, tensor in model.state_dict().items():
        if tensor.is_meta and key in elsewhere:
            tensors[key] = tensor
            continue
        _check_storable(key, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = owners.setdefault(place if tensor.numel() else key, key)
        if owner == key:
            tensors[key] = tensor
        else:
            aliases[key] = owner
    return tensors, aliases


def _check_storable(key: str, value: object) -> None:
    obstacle = None
    if type(value) not in (Tensor, nn.Parameter):
        obstacle = f"is a {type(value).__name__}, not a plain tensor"
    elif isinstance(value, Tensor):
        if value.is_meta:
            obstacle = "has no values (it is on the meta device, or offloaded)"
        elif value.layout != torch.strided or value.dtype not in DTYPES.values():
            obstacle = f"is {value.dtype}, {value.layout}, which safetensors cannot hold"
    if obstacle is not None:
        raise CheckpointError(f"tensor {key} {obstacle}; it cannot be saved or compared")
