"""Rotation: what the layers read is mixed by a Hadamard matrix, so that no channel stands out.

Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv 2404.00456),
section 3. The inverse is merged into the weights. Between the values of an attention and the layer
that reads its heads, the rotation of each head is merged into the values as well. Elsewhere it is
done as the input arrives, by two small products (:class:`ptq.core.Rotation`), and layers that read
the same input share it. Signs before the matrix, of which the paper draws one set, are merged into
what the input comes from; a few draws are compared on calibration rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ptq.config import Scheme
from ptq.core import Rotation
from ptq.modules import rotate_inputs
from ptq.transforms.apply import mix_source, mix_targets, scale_source, scale_targets
from ptq.transforms.base import ChannelStats, ScaleGroup
from ptq.transforms.search import Target, relative_errors, targets_of


class RotationOptions(BaseModel):
    """When it is worth its time."""

    model_config = ConfigDict(extra="forbid", strict=True)
    gain: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="least share of the error that must go"
    )
    draws: Annotated[int, Field(ge=0, le=100)] = Field(
        4, description="draws of signs that are tried, where a norm can hold them"
    )


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


@dataclass(frozen=True, eq=False)
class _Choice:
    """A rotation of what some layers read: of its draws of signs, the best one.

    Args:
        merged: it is done by the layer that gives what they read, and costs nothing at run time.
        signs: float32 [K] of 1 and -1, before the matrix; the draw of a number, 0 is all ones.
        error: of the targets, squared.
    """

    rotation: Rotation
    merged: bool
    number: int
    signs: Tensor
    error: float

    def __str__(self) -> str:
        word = "merged" if self.merged else "rotated"
        signs = f", signs {self.number}" if self.number else ""
        return f"{word} by {self.rotation.left} x {self.rotation.right}{signs}"


def _rotate(
    block: nn.Module,
    group: ScaleGroup | None,
    names: list[str],
    samples: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    options: RotationOptions,
) -> str:
    targets = targets_of(block, names, samples, schemes)
    flat = torch.ones(targets[0].weight.shape[1], device=targets[0].weight.device)
    least = unrotated = sum(target.error(flat) for target in targets)
    chosen, tried = None, None
    for tried in _choices(targets, group, flat, options.draws):
        if tried.error < (1 - options.gain) ** 2 * least:
            chosen, least = tried, tried.error
    if tried is None:
        return f"not rotated, there is no Hadamard matrix for {flat.numel()} channels"
    before, after = relative_errors(targets, unrotated, (chosen or tried).error)
    change = f"relative error {before:.3g} -> {after:.3g}"
    if chosen is None:
        return f"not rotated, {change}"
    _apply(block, group, names, chosen)
    return f"{chosen}, {change}"


def _choices(
    targets: Sequence[Target], group: ScaleGroup | None, flat: Tensor, draws: int
) -> Iterator[_Choice]:
    """The rotations of an input, what costs least at run time first."""
    size = flat.numel()
    if group is not None and group.mixes is not None:
        rotation = Rotation.of(size, group.mixes)
        signs = [s.repeat(size // group.mixes) for s in _draws(flat[: group.mixes], draws)]
        if rotation.order > 1:
            yield _best(targets, rotation, True, [flat, *signs])
    rotation = Rotation.of(size)
    if rotation.order > 1:
        signs = list(_draws(flat, draws if _holds_signs(group) else 0))
        yield _best(targets, rotation, False, [flat, *signs])


def _best(
    targets: Sequence[Target], rotation: Rotation, merged: bool, signs: list[Tensor]
) -> _Choice:
    errors = [sum(_error(target, rotation, s) for target in targets) for s in signs]
    draw = min(range(len(signs)), key=lambda number: errors[number])
    return _Choice(rotation, merged, draw, signs[draw], errors[draw])


def _apply(block: nn.Module, group: ScaleGroup | None, names: list[str], choice: _Choice) -> None:
    if choice.number and group is not None:
        scale_source(block, group, choice.signs)
        scale_targets(block, group, choice.signs)
    if choice.merged and group is not None:
        source = block.get_submodule(group.source)
        assert isinstance(source.weight, Tensor)
        mix_source(block, group, Rotation.of(source.weight.shape[0], group.mixes))
        mix_targets(block, group, choice.rotation.weight)
        return
    modules = (block.get_submodule(name) for name in names)
    rotate_inputs([module for module in modules if isinstance(module, nn.Linear)])


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
