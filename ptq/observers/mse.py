"""The range whose codes have the least error."""

from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.core import choose_qparams
from ptq.formats import INTEGERS
from ptq.observers.base import Codes
from ptq.observers.histogram import Histogram

_NARROWEST = 16  # bins (of B); a narrower range would be a guess at what lies inside the bins
_ROUNDS = 8
_AT_ONCE = 32  # channels: their work space stays in the cache


class MSEOptions(BaseModel):
    """How to search.

    ``grid``: number of shrink factors, in geometric sequence. ``norm``: the power of the error; 2.4
    clips less.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    grid: Annotated[int, Field(ge=2, le=4096)] = Field(
        128, description="shrink factors that are tried, in geometric sequence"
    )
    norm: Annotated[float, Field(ge=1, le=8)] = Field(
        2.0, description="power of the error; 2.4 clips less"
    )


class MSE:
    """The clipped range with the least mean of ``|x - x'|^norm``.

    x' is what the scheme's codes give back for the scale that ``choose_qparams`` makes of it. The
    values in a bin of the histogram are taken to be spread evenly over it, and the error is
    integrated over the bin, so that steps finer than a bin are judged fairly.

    Candidates are the extremes times 1 down to 16 / B (see ``Histogram``). For a symmetric scheme
    there is one factor for both ends, and every candidate is tried. For one with a zero point both
    ends first shrink alike, and then each in turn while that helps, at most 8 times; of the
    grid x grid pairs this may miss the best.
    """

    order_dependent: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = MSEOptions

    def __init__(self, channels: int | None, options: MSEOptions, scheme: Codes) -> None:
        self.grid, self.norm = options.grid, options.norm
        self.symmetric, self.format = scheme.symmetric, INTEGERS[scheme.format]
        self.histogram = Histogram(channels)

    def update(self, rows: Tensor) -> None:
        self.histogram.update(rows)

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = self.histogram.extremes
        best_low, best_high = self._one_threshold() if self.symmetric else self._two_ends()
        constant = low == high  # there is nothing to gain, and codes may miss it by half a step
        return torch.where(constant, low, best_low), torch.where(constant, high, best_high)

    def factors(self) -> Tensor:
        """Float64 [grid], from 1 down."""
        share = torch.linspace(0, 1, self.grid, dtype=torch.float64)
        return (_NARROWEST / self.histogram.bins) ** share

    def _one_threshold(self) -> tuple[Tensor, Tensor]:
        low, high = self.histogram.extremes
        threshold = _times(self.factors(), torch.maximum(high, -low))
        return self._best(low.clamp(-threshold, threshold), high.clamp(-threshold, threshold))

    def _two_ends(self) -> tuple[Tensor, Tensor]:
        low, high = self.histogram.extremes
        # An end on the far side of zero stays: the range is widened to zero anyway.
        lows = torch.where(low < 0, _times(self.factors(), low), low)
        highs = torch.where(high > 0, _times(self.factors(), high), high)
        low, high = self._best(lows, highs)
        for _ in range(_ROUNDS):
            before = low, high
            low, high = self._best(lows, high.expand_as(lows))
            low, high = self._best(low.expand_as(highs), highs)
            if torch.equal(low, before[0]) and torch.equal(high, before[1]):
                break
        return low, high

    def _best(self, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """Of the candidates [G, C], float32, the first with the least error, for each channel."""
        # In data of one sign an end may have been drawn beyond the other.
        lows, highs = torch.minimum(lows, highs), torch.maximum(lows, highs)
        pairs = zip(lows, highs, strict=True)
        best = torch.stack([self._error(low, high) for low, high in pairs]).argmin(0, keepdim=True)
        return lows.gather(0, best)[0], highs.gather(0, best)[0]

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        """Sum of the errors: float64 [C], in units of the bin's width to the power ``norm``."""
        qparams = choose_qparams(low, high, self.format, symmetric=self.symmetric)
        step = (qparams.scale.double() / self.histogram.width)[:, None]
        zero_point = qparams.zero_point
        zero = torch.zeros_like(step) if zero_point is None else zero_point.double()[:, None]
        parts = (torch.split(t, _AT_ONCE) for t in (step, zero, self.histogram.counts))
        rows = zip(*parts, strict=True)
        return torch.cat([self._integral(*row) for row in rows])

    def _integral(self, step: Tensor, zero: Tensor, counts: Tensor) -> Tensor:
        """Sum of the errors over the bins, where a bin is one wide: float64 [C].

        Args:
            step, zero: float64 [C, 1].
            counts: [C, 2 B].
        """
        bins = counts.shape[1] // 2
        edges = torch.arange(-bins, bins + 1, dtype=torch.float64, device=step.device) / step
        codes = edges.round().clamp_(self.format.qmin - zero, self.format.qmax - zero)
        # The integral of |u - code(u)|^norm from zero to u: whole steps, and what is left.
        power = self.norm + 1
        off = edges - codes
        area = off.abs().pow_(power).copysign_(off).add_(codes.mul_(2 * 0.5**power)).div_(power)
        return (area.diff(dim=1) * counts).sum(1) * step[:, 0] ** power


def _times(factors: Tensor, end: Tensor) -> Tensor:
    """[G] times [C]: float32 [G, C]; exact where the factor is one."""
    return (factors.to(end.device)[:, None] * end.double()).float()
