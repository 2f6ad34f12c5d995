"""The range that holds all but a small share of the values at each end."""

import math
from fractions import Fraction
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.errors import CalibrationError
from ptq.observers.base import extremes, nothing_seen

_TENSOR_BINS = 4096  # on each side of zero: 64 KiB
_CHANNEL_BINS = 256  # on each side of zero: 2 KiB a channel
_SMALLEST = -100  # exponent of the range of data that is all zero
_AT_ONCE = 1 << 16  # values that are widened to float64 at a time: they stay in the cache


class PercentileOptions(BaseModel):
    """Which share is kept: ``percentile`` of 99.9 cuts the outer 0.1% at each end."""

    model_config = ConfigDict(extra="forbid", strict=True)
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99


class Percentile:
    """Percentiles from a histogram of fixed size.

    Of n values, floor(n (100 - p) / 100) are cut at each end. The range is never narrower than
    the values that are left, and at each end at most one bin wider.

    The bins are [j w, (j + 1) w) with w = 2^e / B, where 2^e is the smallest power of two above
    the magnitude of every value so far. When a larger value arrives, neighbouring bins are merged,
    which gives exactly the counts that the wider bins would have had from the start: the result
    depends neither on the order of the values nor on their batches. B is 4096 for a tensor and 256
    for a channel, so a bin is at most 1/2048 or 1/128 of the largest magnitude.
    """

    order_dependent: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = PercentileOptions

    def __init__(self, channels: int | None, options: PercentileOptions) -> None:
        self.channels = channels
        # From the decimal text, so that 99.9 cuts one of 1000 values, not none or two.
        self.cut_share = 1 - Fraction(str(options.percentile)) / 100
        self.bins = _TENSOR_BINS if channels is None else _CHANNEL_BINS
        self.seen = 0  # values, of each channel
        self.counts: Tensor | None = None  # int64 [1, 2 B], or int32 [C, 2 B]
        self.exponent: Tensor | None = None  # int32 [1 or C]
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
            dtype = torch.int64 if self.channels is None else torch.int32
            shape = (len(exponent), 2 * self.bins)
            self.counts = torch.zeros(shape, dtype=dtype, device=rows.device)
        else:
            self.counts = _widen(self.counts, exponent - self.exponent)
        self.exponent = exponent
        self.seen += rows.numel() if self.channels is None else rows.shape[0]
        self._count(rows, self.counts)

    def _count(self, rows: Tensor, counts: Tensor) -> None:
        if counts.dtype == torch.int32 and self.seen > torch.iinfo(torch.int32).max:
            raise CalibrationError(
                "observer percentile: more than 2^31 rows per channel; give less data"
            )
        # [C] where per channel: each channel has its own stretch of the flat counts.
        start = self.bins + torch.arange(len(counts), device=rows.device) * counts.shape[1]
        width = self._width()
        for part in torch.split(rows, max(1, _AT_ONCE // rows.shape[1])):
            # Exact: float64 holds the quotient by a power of two of any float32.
            bins = (part.double() / width).floor_().to(torch.int32).add_(start).reshape(-1)
            if self.channels is None:
                counts += torch.bincount(bins, minlength=counts.numel())
            else:
                ones = torch.ones_like(bins, dtype=counts.dtype)
                counts.view(-1).index_add_(0, bins, ones)

    def _width(self) -> Tensor:
        """Width of a bin: float64 [1 or C]."""
        assert self.exponent is not None
        one = torch.ones_like(self.exponent, dtype=torch.float64)
        return torch.ldexp(one, self.exponent) / self.bins

    def range(self) -> tuple[Tensor, Tensor]:
        if self.counts is None or self.low is None or self.high is None:
            raise nothing_seen()
        cut = math.floor(self.seen * self.cut_share)
        below = self.counts.cumsum(1)
        above = self.counts.flip(1).cumsum(1).flip(1)
        first = (below <= cut).sum(1) - self.bins
        last = (above > cut).sum(1) - 1 - self.bins
        width = self._width()
        low = (first * width).float().maximum(self.low)
        high = ((last + 1) * width).float().minimum(self.high)
        return low, high


def _widen(counts: Tensor, doublings: Tensor) -> Tensor:
    """Merge each 2^doublings neighbouring bins of every row."""
    if not bool(doublings.any()):
        return counts
    bins = counts.shape[1] // 2
    edge = torch.arange(-bins, bins, device=counts.device)
    # Arithmetic shifts round down, also below zero; beyond 62 all is -1 or 0.
    target = (edge[None] >> doublings[:, None].clamp(max=62).long()) + bins
    return torch.zeros_like(counts).scatter_add_(1, target, counts)
