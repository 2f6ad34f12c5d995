"""Proof that two models hold the same bits."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ptq.checkpoint.outputs import computed_buffers
from ptq.checkpoint.shard import dtype_name
from ptq.checkpoint.tensors import distinct_tensors
from ptq.config import Scheme
from ptq.errors import CheckpointError
from ptq.modules import quantized_modules


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Check that two models have the same tensors, bit for bit, and the same quantized layers.

    Compared are the entries of ``state_dict()`` and which of them share memory, the buffers that
    are not in it (rotary frequencies), and the scheme of every quantized module. NaNs are compared
    by their bits. The models may be on different devices; one tensor at a time is moved.

    Raises:
        CheckpointError: names the first layer or tensor that differs.
    """
    schemes_a, schemes_b = _schemes(a), _schemes(b)
    _same_names("quantized layer", schemes_a, schemes_b)
    for name, scheme in schemes_a.items():
        if scheme != schemes_b[name]:
            raise CheckpointError(f"layer {name} differs: {scheme!r} against {schemes_b[name]!r}")
    (stored_a, ties_a), (stored_b, ties_b) = distinct_tensors(a), distinct_tensors(b)
    _same_names("tied tensor", ties_a, ties_b)
    for of_a, of_b in ((stored_a, stored_b), (computed_buffers(a), computed_buffers(b))):
        _same_names("tensor", of_a, of_b)
        for name, tensor in of_a.items():
            _same_tensor(name, tensor, of_b[name])


def _schemes(model: nn.Module) -> dict[str, Scheme]:
    return {name: module.scheme for name, module in quantized_modules(model).items()}


def _same_names(kind: str, a: Collection[str], b: Collection[str]) -> None:
    for name in (*a, *b):
        if (name in a) != (name in b):
            raise CheckpointError(f"{kind} {name} is in one of the models only")


def _same_tensor(name: str, a: Tensor, b: Tensor) -> None:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        raise CheckpointError(
            f"tensor {name} differs: {dtype_name(a.dtype)} {list(a.shape)} "
            f"against {dtype_name(b.dtype)} {list(b.shape)}"
        )
    if not torch.equal(_bits(a), _bits(b.to(a.device))):
        raise CheckpointError(f"tensor {name} differs in its values")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
