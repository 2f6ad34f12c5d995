"""Rotation: what the layers read is mixed by a Hadamard matrix, so that no channel stands out.

Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv 2404.00456),
section 3. The inverse is merged into the weights; the rotation itself is done as the input arrives,
by two small products (:class:`ptq.core.Rotation`), and layers that read the same input share it.
Signs before the matrix, of which the paper draws one set, are merged into the norm that the input
comes from; a few draws are compared on calibration rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ptq.config import Scheme
from ptq.core import Rotation
from ptq.modules import rotate_inputs
from ptq.transforms.apply import scale_source, scale_targets
from ptq.transforms.base import ChannelStats, ScaleGroup
from ptq.transforms.search import Target, relative_errors, targets_of


class RotationOptions(BaseModel):
    """When it is worth its time."""

    model_config = ConfigDict(extra="forbid", strict=True)
    gain: Annotated[float, Field(ge=0, lt=1)] = 0.1  # least share of the error that must go
    draws: Annotated[int, Field(ge=0, le=100)] = 4  # of signs, where a norm can hold them


@torch.no_grad()
def rotate(
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    samples: Mapping[str, Tensor],
    _: Mapping[str, ChannelStats],
    schemes: Mapping[str, Scheme],
    options: RotationOptions,
) -> list[str]:
    """Rotate the input of every quantized layer that gains enough by it (see
    :class:`ptq.transforms.Transform`); a note for each input.

    Layers that are no target of a group are rotated each by itself.
    """
    notes = []
    for group, names in _inputs(groups, schemes):
        label = ", ".join(names) if group is None else str(group)
        if any(name not in samples for name in names):
            notes.append(f"{label}: not rotated, no calibration row reaches it")
        else:
            notes.append(f"{label}: {_rotate(block, group, names, samples, schemes, options)}")
    return notes


def _inputs(
    groups: Sequence[ScaleGroup], schemes: Mapping[str, Scheme]
) -> Iterator[tuple[ScaleGroup | None, list[str]]]:
    """The quantized layers by what they read, and the group that they are the targets of."""
    known: set[str] = set()
    for group in groups:
        names = [name for name in group.targets if name in schemes]
        known.update(names)
        if names:
            yield group, names
    yield from ((None, [name]) for name in schemes if name not in known)


def _rotate(
    block: nn.Module,
    group: ScaleGroup | None,
    names: list[str],
    samples: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    options: RotationOptions,
) -> str:
    targets = targets_of(block, names, samples, schemes)
    rotation = Rotation.of(targets[0].weight.shape[1])
    if rotation.order == 1:
        return f"not rotated, there is no Hadamard matrix for {rotation.size} channels"
    flat = torch.ones(rotation.size, device=targets[0].weight.device)
    unrotated = sum(target.error(flat) for target in targets)
    signs = [flat, *_draws(flat, options.draws if _holds_signs(group) else 0)]
    errors = [sum(_error(target, rotation, s) for target in targets) for s in signs]
    best = min(range(len(signs)), key=lambda draw: errors[draw])
    before, after = relative_errors(targets, unrotated, errors[best])
    change = f"relative error {before:.3g} -> {after:.3g}"
    if not after < (1 - options.gain) * before:
        return f"not rotated, {change}"
    if best and group is not None:
        scale_source(block, group, signs[best])
        scale_targets(block, group, signs[best])
    modules = (block.get_submodule(name) for name in names)
    rotate_inputs([module for module in modules if isinstance(module, nn.Linear)])
    word = f"signs {best}, " if best else ""
    return f"rotated by {rotation.left} x {rotation.right}, {word}{change}"


def _holds_signs(group: ScaleGroup | None) -> bool:
    """Whether the source can be negated by channel, bit for bit, without being run again: a norm
    that multiplies by its plain weight."""
    return group is not None and group.kind == "norm" and group.offset == 0


def _draws(like: Tensor, count: int) -> Iterator[Tensor]:
    """Random signs, always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        drawn = torch.randint(2, like.shape, generator=generator) * 2.0 - 1.0
        yield drawn.to(like.device)


def _error(target: Target, rotation: Rotation, signs: Tensor) -> float:
    return target.error_of(
        rotation(target.rows * signs), rotation.weight(target.weight.float() * signs)
    )
