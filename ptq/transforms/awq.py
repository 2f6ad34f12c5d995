"""AWQ: the weights of channels with large inputs become larger, and so are rounded more finely.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration" (arXiv 2306.00978), section 3.2, equations 4 and 5: ``s_j = mean|x_j|^a``, with a from
a grid by the error of the layer's output. Each a is also tried with ``s_j / mean|w_j|^(1 - a)``, w
relative to the largest weight of its scale, as the authors' later code does. The paper's search for
clipped ranges is left to the algorithm that rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ptq.config import Scheme
from ptq.transforms.base import ChannelStats, ScaleGroup
from ptq.transforms.search import Reach, Target, scale_groups


class AWQOptions(BaseModel):
    """How finely."""

    model_config = ConfigDict(extra="forbid", strict=True)
    grid: Annotated[int, Field(ge=1, le=1000)] = Field(
        20, description="steps of the search from 0 to 1"
    )


def awq(
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    samples: Mapping[str, Tensor],
    stats: Mapping[str, ChannelStats],
    schemes: Mapping[str, Scheme],
    options: AWQOptions,
) -> list[str]:
    """Scale every group that has a quantized target (see :class:`ptq.transforms.Transform`)."""

    def propose(reach: Reach) -> Iterator[tuple[str, Tensor]]:
        sizes = reach.shared(_relative_size(reach.targets), "mean")
        alive = (reach.absmean > 0) & (sizes > 0)
        for step in range(options.grid + 1):
            a = step / options.grid
            x = reach.absmean.pow(a)
            if step:
                yield f"strength {a:.3g}", torch.where(alive, x, torch.nan)
            if step < options.grid:
                scaled = x / sizes.pow(1 - a)
                yield f"strength {a:.3g} with weights", torch.where(alive, scaled, torch.nan)

    return scale_groups(block, groups, samples, stats, schemes, propose)


def _relative_size(targets: Sequence[Target]) -> Tensor:
    """float32 [K]: the mean over rows of ``|w|``, relative to the largest of its scale."""
    total, rows = torch.zeros(()), 0
    for target in targets:
        parts = target.scheme.weights.granularity_value.split(target.weight.float().abs())
        relative = parts / parts.amax(-1, keepdim=True).clamp(min=1e-12)
        total = total.to(relative.device) + relative.reshape(target.weight.shape).sum(0)
        rows += target.weight.shape[0]
    return total / rows
