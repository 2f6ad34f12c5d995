"""Counts of values in bins that widen as larger values arrive."""

import torch
from torch import Tensor

from ptq.errors import CalibrationError
from ptq.observers.base import extremes, nothing_seen

_TENSOR_BINS = 4096  # on each side of zero: 64 KiB
_CHANNEL_BINS = 256  # on each side of zero: 2 KiB a channel
_SMALLEST = -100  # exponent of the range of data that is all zero
_AT_ONCE = 1 << 16  # values that are widened to float64 at a time: they stay in the cache


class Histogram:
    """How many values fell into each bin, and the extremes, in memory that does not grow.

    The bins are [j w, (j + 1) w), -B <= j < B, with w = 2^e / B, where 2^e is the smallest power of
    two above the magnitude of every value so far. When a larger value arrives, neighbouring bins
    are merged, which gives exactly the counts that the wider bins would have had from the start:
    the result depends neither on the order of the values nor on their batches. B is 4096 for a
    tensor and 256 for a channel, so a bin is at most 1/2048 or 1/128 of the largest magnitude.
    """

    def __init__(self, channels: int | None) -> None:
        self.channels = channels
        self.bins = _TENSOR_BINS if channels is None else _CHANNEL_BINS  # B
        self.seen = 0  # values, of each channel
        self._counts: Tensor | None = None  # int64 [1, 2 B], or int32 [C, 2 B]
        self._exponent: Tensor | None = None  # int32 [1 or C]
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Count rows [R, C]: floating point, finite."""
        if rows.shape[0] == 0:
            return
        counts = self._make_room(*extremes(rows, self.channels))
        self._see(rows.numel() if self.channels is None else rows.shape[0])
        # [C] where per channel: each channel has its own stretch of the flat counts.
        start = self.bins + torch.arange(len(counts), device=rows.device) * counts.shape[1]
        width = self.width
        for part in torch.split(rows, max(1, _AT_ONCE // rows.shape[1])):
            # Exact: float64 holds the quotient by a power of two of any float32.
            bins = (part.double() / width).floor_().to(torch.int32).add_(start).reshape(-1)
            if self.channels is None:
                counts += torch.bincount(bins, minlength=counts.numel())
            else:
                ones = torch.ones_like(bins, dtype=counts.dtype)
                counts.view(-1).index_add_(0, bins, ones)

    def merge(self, other: "Histogram") -> None:
        """Add what another one (of as many channels) counted, as if it had been seen here."""
        assert self.channels == other.channels
        if other._exponent is None:
            return
        counts = self._make_room(*other.extremes)
        self._see(other.seen)
        assert self._exponent is not None
        counts += _widen(other.counts, self._exponent - other._exponent)

    @property
    def counts(self) -> Tensor:
        """Whole numbers [1 or C, 2 B]; column B is the bin that begins at zero."""
        if self._counts is None:
            raise nothing_seen()
        return self._counts

    @property
    def width(self) -> Tensor:
        """Width of a bin: float64 [1 or C]."""
        if self._exponent is None:
            raise nothing_seen()
        one = torch.ones_like(self._exponent, dtype=torch.float64)
        return torch.ldexp(one, self._exponent) / self.bins

    @property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value, exactly: float32 [1 or C]."""
        if self._low is None or self._high is None:
            raise nothing_seen()
        return self._low, self._high

    def _make_room(self, low: Tensor, high: Tensor) -> Tensor:
        """The counts, in bins that reach these values too."""
        self._low = low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high = high if self._high is None else torch.maximum(self._high, high)
        # frexp: |x| = m 2^e with m in [0.5, 1), so 2^e is above it.
        exponent = torch.maximum(high, -low).clamp(min=2.0**_SMALLEST).frexp().exponent
        if self._counts is None or self._exponent is None:
            dtype = torch.int64 if self.channels is None else torch.int32
            shape = (len(exponent), 2 * self.bins)
            self._counts = torch.zeros(shape, dtype=dtype, device=low.device)
        else:
            self._counts = _widen(self._counts, exponent - self._exponent)
        self._exponent = exponent
        return self._counts

    def _see(self, values: int) -> None:
        self.seen += values
        if self.channels is not None and self.seen > torch.iinfo(torch.int32).max:
            raise CalibrationError("more than 2^31 rows per channel; give less data")


def _widen(counts: Tensor, doublings: Tensor) -> Tensor:
    """Merge each 2^doublings neighbouring bins of every row."""
    if not bool(doublings.any()):
        return counts
    bins = counts.shape[1] // 2
    edge = torch.arange(-bins, bins, device=counts.device)
    # Arithmetic shifts round down, also below zero; beyond 62 all is -1 or 0.
    target = (edge[None] >> doublings[:, None].clamp(max=62).long()) + bins
    return torch.zeros_like(counts).scatter_add_(1, target, counts)
