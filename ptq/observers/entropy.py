"""The range whose levels lose the least information."""

from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.errors import ConfigError
from ptq.formats import INTEGERS
from ptq.observers.base import Codes
from ptq.observers.histogram import Histogram

_SMOOTHING = 1e-6  # share of the quantized distribution that is spread over all bins


class EntropyOptions(BaseModel):
    """``grid``: number of thresholds to try, in geometric sequence."""

    model_config = ConfigDict(extra="forbid", strict=True)
    grid: Annotated[int, Field(ge=2, le=4096)] = Field(
        128, description="thresholds that are tried, in geometric sequence"
    )


class Entropy:
    """The threshold with the least Kullback-Leibler divergence (S. Migacz, "8-bit Inference with
    TensorRT", GTC 2017): of the magnitudes up to it, those above it counted in the last bin, from
    the same quantized to levels, those above it dropped.

    Both ends get the same threshold. Magnitudes have half the codes as levels, 128 of int8, as with
    Migacz; where a zero point lets the codes cover just what is there, as many as fall between zero
    and the threshold: all 256 of data of one sign. Unlike Migacz, this tries ``grid`` thresholds
    instead of one for every bin, from as many bins as there can be levels (a bin is 1/4096 to
    1/2048 of the largest magnitude) up to everything. Values next to zero are counted as their
    neighbours are: zeros, of which there are many after a ReLU, have a code of their own whatever
    the threshold.
    """

    order_dependent: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = EntropyOptions

    def __init__(self, channels: int | None, options: EntropyOptions, scheme: Codes) -> None:
        if channels is not None:
            raise ConfigError(
                "observer entropy: it has one range per tensor, and one per channel was asked; "
                "use mse, percentile or minmax"
            )
        self.grid = options.grid
        fmt = INTEGERS[scheme.format]
        self.codes, self.symmetric = fmt.qmax - fmt.qmin + 1, scheme.symmetric
        self.histogram = Histogram(None)

    def update(self, rows: Tensor) -> None:
        self.histogram.update(rows)

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = self.histogram.extremes
        if bool(low == high):
            return low, high
        counts = self._magnitudes()
        fewest = self.codes // 2 if self.symmetric else self.codes
        sizes = _sizes(int(counts.nonzero().max()) + 1, fewest, self.grid)
        divergence = torch.stack([_divergence(counts, n, self.levels(n)) for n in sizes])
        threshold = (sizes[int(divergence.argmin())] * self.histogram.width).float()
        return low.clamp(-threshold, threshold), high.clamp(-threshold, threshold)

    def levels(self, size: int) -> int:
        """How many codes there are from zero to the edge of so many bins, of the longer side."""
        if self.symmetric:
            return self.codes // 2
        edge = size * float(self.histogram.width)
        low, high = (float(x) for x in self.histogram.extremes)
        below, above = min(max(0.0, -low), edge), min(max(0.0, high), edge)
        return round(self.codes * max(below, above) / (below + above))

    def _magnitudes(self) -> Tensor:
        """Counts by magnitude: float64 [B] of whole numbers, on the CPU."""
        below, above = self.histogram.counts[0].cpu().double().chunk(2)
        counts = above + below.flip(0)
        counts[0] = counts[1]
        return counts


def _sizes(largest: int, fewest: int, grid: int) -> list[int]:
    """Numbers of bins to keep, falling from the largest: of equal divergences the first wins."""
    share = torch.linspace(0, 1, grid, dtype=torch.float64)
    sizes = (largest * (fewest / largest) ** share).round()
    return sorted({int(size) for size in sizes}, reverse=True)


def _divergence(counts: Tensor, size: int, levels: int) -> Tensor:
    """KL divergence (nats, float64 scalar) where the first ``size`` bins are kept."""
    kept = counts[:size]
    if not bool(kept.any()):
        return torch.tensor(torch.inf, dtype=torch.float64)
    reference = kept.clone()
    reference[-1] += counts[size:].sum()
    support = (reference > 0).double()
    level = torch.arange(size) * levels // size
    # The counts of a level, evenly over its bins that hold anything.
    of_level = torch.bincount(level, kept) / torch.bincount(level, support).clamp(min=1)
    quantized = of_level[level] * support
    p = reference / reference.sum()
    # Else the divergence is infinite where only values above the threshold are in the last bin.
    q = torch.lerp(quantized / quantized.sum(), support / support.sum(), _SMOOTHING)
    p, q = p[support > 0], q[support > 0]
    return (p * (p / q).log()).sum()
