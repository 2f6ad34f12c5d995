"""Exponential moving average of each batch's extremes (Jacob et al. 2018, section 3.1)."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.observers.base import Codes, extremes, nothing_seen


class MovingAverageOptions(BaseModel):
    """``momentum``: the weight of what was seen before, against one batch."""

    model_config = ConfigDict(extra="forbid", strict=True)
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="weight of what was seen before, against one batch"
    )


class MovingAverage:
    """``momentum`` of the old range and the rest of the new batch's, once a batch.

    The first batch sets the range. A value that only one batch has may lie outside the range.
    """

    order_dependent: ClassVar[bool] = True
    Options: ClassVar[type[BaseModel]] = MovingAverageOptions

    def __init__(self, channels: int | None, options: MovingAverageOptions, _: Codes) -> None:
        self.channels = channels
        self.momentum = options.momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        if rows.shape[0] == 0:
            return
        low, high = extremes(rows, self.channels)
        self.low = low if self.low is None else self.low.lerp(low, 1 - self.momentum)
        self.high = high if self.high is None else self.high.lerp(high, 1 - self.momentum)

    def range(self) -> tuple[Tensor, Tensor]:
        if self.low is None or self.high is None:
            raise nothing_seen()
        return self.low, self.high
