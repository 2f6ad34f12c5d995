"""Equalization: a linear layer's output channels, and its reader's input channels, get one range.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv
1906.04721), section 4.1, equation 11: ``s_i = sqrt(r1_i r2_i) / r2_i`` with r1_i the range of the
source's row i and r2_i that of the reader's column i, here ``max|w|``. Layers that are in several
pairs are equalized pair by pair until nothing moves, as the paper does. It needs no data; data
decides whether it is used. The paper's absorption of high biases is not done.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ptq.config import Scheme
from ptq.transforms.apply import apply_scale
from ptq.transforms.base import ChannelStats, ScaleGroup
from ptq.transforms.chain import Chain, chains_of
from ptq.transforms.scaled import ScaledLayer
from ptq.transforms.search import targets_of

_STILL = 1e-4  # change of a scale, relative, below which nothing moves


class EqualizeOptions(BaseModel):
    """How often."""

    model_config = ConfigDict(extra="forbid", strict=True)
    iterations: Annotated[int, Field(ge=1, le=10_000)] = Field(
        100, description="over the pairs of a chain, at most"
    )


@torch.no_grad()
def equalize(
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    samples: Mapping[str, Tensor],
    stats: Mapping[str, ChannelStats],
    schemes: Mapping[str, Scheme],
    options: EqualizeOptions,
) -> list[str]:
    """Equalize every chain of groups where that brings its quantized layers nearer to the float
    ones on sampled inputs (see :class:`ptq.transforms.Transform`).

    The source of a group may be a norm, which has no weights to equalize; its group is left alone.
    """
    wanted = [group for group in groups if any(name in schemes for name in group.targets)]
    notes = {
        group: "no scaling, a norm has no range to equalize"
        for group in wanted
        if group.kind == "norm"
    }
    for chain in chains_of([group for group in wanted if group.kind != "norm"]):
        reached = {name for group in chain for name in group.targets if name in schemes}
        if reached <= stats.keys():
            note = _equalize(Chain(block, chain), samples, schemes, options)
        else:
            note = "not scaled, no calibration row reaches it"
        notes |= dict.fromkeys(chain, note)
    return [f"{group}: {notes[group]}" for group in wanted]


def _equalize(
    chain: Chain,
    samples: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    options: EqualizeOptions,
) -> str:
    """Equalize a chain if that lessens its error; returns what was done."""
    reached = [name for name in chain.layers() if name in schemes and name in samples]
    targets = targets_of(chain.block, reached, samples, schemes)
    layers = {
        name: ScaledLayer(target, chain.readers(name))
        for name, target in zip(reached, targets, strict=True)
    }
    before, most = _error(chain, layers), options.iterations
    sweeps = next((n for n in range(1, most + 1) if chain.sweep() < _STILL), most)
    after = _error(chain, layers)
    better = after < before
    if better:
        for group, s in chain.scales.items():
            apply_scale(chain.block, group, s)
    word = f"equalized in {sweeps} sweeps" if better else "no scaling is best"
    return f"{word}, relative error {before:.3g} -> {min(before, after):.3g}"


def _error(chain: Chain, layers: Mapping[str, ScaledLayer]) -> float:
    """The root of the mean over the layers of their squared errors, each relative to what the
    layer gives."""
    errors = [layer.error(*chain.rows_and_columns(name)) for name, layer in layers.items()]
    return math.sqrt(sum(errors) / len(errors))
