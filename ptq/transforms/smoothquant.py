"""SmoothQuant: outliers of the input move into the weights.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models" (arXiv 2211.10438), equation 4: ``s_j = max|x_j|^a / max|w_j|^(1 - a)``, the input divided
by s and the weight's columns multiplied. The paper sets one strength a for a model; here each group
finds its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ptq.config import Scheme
from ptq.transforms.base import ChannelStats, ScaleGroup
from ptq.transforms.search import Reach, scale_groups


class SmoothQuantOptions(BaseModel):
    """How far."""

    model_config = ConfigDict(extra="forbid", strict=True)
    strength: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = Field(
        "search",
        description="how much of the activations' outliers the weights take; search: what "
        "measures best for each group of layers",
    )
    grid: Annotated[int, Field(ge=1, le=1000)] = Field(
        20, description="steps of the search from 0 to 1"
    )


def smoothquant(
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    samples: Mapping[str, Tensor],
    stats: Mapping[str, ChannelStats],
    schemes: Mapping[str, Scheme],
    options: SmoothQuantOptions,
) -> list[str]:
    """Scale every group that has a quantized target (see :class:`ptq.transforms.Transform`).

    A strength that is given is still not used where no scaling is better.
    """

    def propose(reach: Reach) -> Iterator[tuple[str, Tensor]]:
        largest = torch.stack([t.weight.abs().amax(0).float() for t in reach.targets]).amax(0)
        largest = reach.shared(largest, "amax")
        for a in _strengths(options):
            s = reach.absmax.pow(a) / largest.pow(1 - a)
            alive = (reach.absmax > 0) & (largest > 0)
            yield f"strength {a:.3g}", torch.where(alive, s, torch.nan)

    return scale_groups(block, groups, samples, stats, schemes, propose)


def _strengths(options: SmoothQuantOptions) -> list[float]:
    if options.strength == "search":
        return [step / options.grid for step in range(options.grid + 1)]
    return [options.strength]
