"""The range that holds all but a small share of the values at each end."""

from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.observers.base import extremes, nothing_seen

_BINS = 4096  # on each side of zero
_SMALLEST = -100  # exponent of the range of data that is all zero


class PercentileOptions(BaseModel):
    """Which share is kept: ``percentile`` of 99.9 cuts the outer 0.1% at each end."""

    model_config = ConfigDict(extra="forbid")
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99


class Percentile:
    """Percentiles from a histogram of fixed size.

    The bins are [j w, (j + 1) w) with w = 2^e / 4096, where 2^e is the smallest power of two above
    every value so far. When a larger value arrives, neighbouring bins are merged, which gives
    exactly the counts that the wider bins would have had from the start: the result depends
    neither on the order of the values nor on their batches. Its error is at most one bin,
    which is less than 1/2048 of the largest value.
    """

    order_dependent: ClassVar[bool] = False

    def __init__(self, channels: int | None, options: PercentileOptions) -> None:
        self.channels = channels
        self.kept = options.percentile / 100
        self.counts: Tensor | None = None  # [1 or C, 2 * _BINS]
        self.exponent: Tensor | None = None  # [1 or C]
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        if rows.shape[0] == 0:
            return
        low, high = extremes(rows, self.channels)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        # frexp: |x| = m 2^e with m in [0.5, 1), so 2^e is above it.
        exponent = torch.maximum(self.high, -self.low).clamp(min=2.0**_SMALLEST).frexp().exponent
        if self.counts is None or self.exponent is None:
            self.counts = torch.zeros(
                len(exponent), 2 * _BINS, dtype=torch.int64, device=rows.device
            )
        else:
            self.counts = _widen(self.counts, exponent - self.exponent)
        self.exponent = exponent
        self._count(rows)

    def _count(self, rows: Tensor) -> None:
        assert self.counts is not None
        width = self._width()
        values = rows.reshape(1, -1) if self.channels is None else rows.t()
        bins = (values.double() / width[:, None]).floor_().to(torch.int64).add_(_BINS)
        if self.channels is None:
            self.counts += torch.bincount(bins[0], minlength=2 * _BINS)
        else:
            self.counts.scatter_add_(1, bins, torch.ones_like(bins))

    def _width(self) -> Tensor:
        """Width of a bin: float64 [1 or C]."""
        assert self.exponent is not None
        return (
            torch.ldexp(torch.ones_like(self.exponent, dtype=torch.float64), self.exponent) / _BINS
        )

    def range(self) -> tuple[Tensor, Tensor]:
        if self.counts is None or self.low is None or self.high is None:
            raise nothing_seen()
        # Whole numbers of values: a share of 1 keeps all, whatever its rounding.
        total = self.counts.sum(1, keepdim=True)
        cut = (total * (1 - self.kept)).floor().to(torch.int64)
        above = self.counts.flip(1).cumsum(1).flip(1)
        below = self.counts.cumsum(1)
        edge = torch.arange(-_BINS, _BINS, device=self.counts.device)
        last = edge[(above > cut).sum(1) - 1]
        first = edge[(below <= cut).sum(1)]
        width = self._width()
        low = (first * width).float().maximum(self.low)
        high = ((last + 1) * width).float().minimum(self.high)
        return low, high


def _widen(counts: Tensor, doublings: Tensor) -> Tensor:
    """Merge each 2^doublings neighbouring bins of every row."""
    if not bool(doublings.any()):
        return counts
    edge = torch.arange(-_BINS, _BINS, device=counts.device)
    # Arithmetic shifts round down, also below zero; beyond 62 all is -1 or 0.
    target = (edge[None] >> doublings[:, None].clamp(max=62).long()) + _BINS
    return torch.zeros_like(counts).scatter_add_(1, target, counts)
