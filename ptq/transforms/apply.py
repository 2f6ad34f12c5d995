"""Changing what a group's source gives, and its readers to match: output channels divided by s and
columns multiplied by it, or both mixed by a matrix."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ptq.transforms.base import ScaleGroup


def apply_scale(block: nn.Module, group: ScaleGroup, s: Tensor) -> Tensor:
    """Divide what the source gives by s and multiply the targets' columns by it, in place.

    Computed in float32, written in the dtype of each weight.

    Args:
        s: float32 [K] > 0 for the targets' input channels; repeated heads have the same.

    Returns:
        The s that was applied (see :func:`realizable`).
    """
    s = realizable(block, group, s)
    scale_source(block, group, s)
    scale_targets(block, group, s)
    return s


@torch.no_grad()
def realizable(block: nn.Module, group: ScaleGroup, s: Tensor) -> Tensor:
    """The scale nearest to s that the weight of a norm can hold exactly, float32 [K].

    A bfloat16 weight has steps of 2^-8, and of a norm that multiplies by 1 + weight a small
    factor is a difference of two large numbers, so what is stored can be some percent off. The
    readers are multiplied by what is stored, not by what was meant. Channels whose factor would
    round to zero, and those where it is zero, keep 1. For a linear source it is s itself.
    """
    source = block.get_submodule(group.source)
    assert isinstance(source.weight, Tensor)
    s = s.to(source.weight.device, torch.float32)
    if group.kind != "norm":
        return s
    factor = source.weight.float() + group.offset
    stored = _divided_norm(source.weight, s, group.offset).float() + group.offset
    exact = factor / stored
    usable = exact.isfinite() & (exact > 0)
    return torch.where(usable, exact, torch.ones_like(exact))


def _divided_norm(weight: Tensor, s: Tensor, offset: int) -> Tensor:
    return ((weight.float() + offset) / s - offset).to(weight.dtype)


@torch.no_grad()
def scale_source(block: nn.Module, group: ScaleGroup, s: Tensor) -> None:
    """Divide the source's output channels by s [K], in place."""
    source = block.get_submodule(group.source)
    weight, bias = source.weight, getattr(source, "bias", None)
    assert isinstance(weight, Tensor)
    s = s.to(weight.device, torch.float32)
    if group.kind == "norm":
        weight.copy_(_divided_norm(weight, s, group.offset))
        own = s
    else:
        own = torch.ones(weight.shape[0], device=s.device)
        own[group.source_channels(s.numel()).to(s.device)] = s
        weight.copy_(weight.float() / own[:, None])
    if isinstance(bias, Tensor):
        bias.copy_(bias.float() / own)


@torch.no_grad()
def scale_targets(block: nn.Module, group: ScaleGroup, s: Tensor) -> None:
    """Multiply the targets' columns by s [K], in place."""
    for name in group.targets:
        weight = block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() * s.to(weight.device, torch.float32))


Mix = Callable[[Tensor], Tensor]
"""Channels, float32 [..., N], to as many that are mixtures of them."""


@torch.no_grad()
def mix_source(block: nn.Module, group: ScaleGroup, mix: Mix) -> None:
    """Let a linear source give ``mix`` of what it gave, in place."""
    source = block.get_submodule(group.source)
    weight, bias = source.weight, getattr(source, "bias", None)
    assert isinstance(weight, Tensor)
    weight.copy_(mix(weight.float().T).T)
    if isinstance(bias, Tensor):
        bias.copy_(mix(bias.float()))


@torch.no_grad()
def mix_targets(block: nn.Module, group: ScaleGroup, mix: Mix) -> None:
    """Mix the columns of the targets' weights, in place."""
    for name in group.targets:
        weight = block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(mix(weight.float()))
