"""The range that holds all but a small share of the values at each end."""

import math
from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.observers.base import Codes
from ptq.observers.histogram import Histogram


class PercentileOptions(BaseModel):
    """Which share is kept: ``percentile`` of 99.9 cuts the outer 0.1% at each end."""

    model_config = ConfigDict(extra="forbid", strict=True)
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        99.99, description="what is kept at each end: 99.9 cuts the outer 0.1%"
    )


class Percentile:
    """Percentiles from a histogram.

    Of n values, floor(n (100 - p) / 100) are cut at each end. The range is never narrower than
    the values that are left, and at each end at most one bin wider.
    """

    order_dependent: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = PercentileOptions

    def __init__(self, channels: int | None, options: PercentileOptions, _: Codes) -> None:
        # From the decimal text, so that 99.9 cuts one of 1000 values, not none or two.
        self.cut_share = 1 - Fraction(str(options.percentile)) / 100
        self.histogram = Histogram(channels)

    def update(self, rows: Tensor) -> None:
        self.histogram.update(rows)

    def range(self) -> tuple[Tensor, Tensor]:
        histogram = self.histogram
        counts, width = histogram.counts, histogram.width
        smallest, largest = histogram.extremes
        cut = math.floor(histogram.seen * self.cut_share)
        below = counts.cumsum(1)
        above = counts.flip(1).cumsum(1).flip(1)
        first = (below <= cut).sum(1) - histogram.bins
        last = (above > cut).sum(1) - 1 - histogram.bins
        low = (first * width).float().maximum(smallest)
        high = ((last + 1) * width).float().minimum(largest)
        return low, high
