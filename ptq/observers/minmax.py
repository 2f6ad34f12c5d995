"""The smallest and the largest value ever seen."""

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ptq.observers.base import Codes, extremes, nothing_seen


class MinMaxOptions(BaseModel):
    """None."""

    model_config = ConfigDict(extra="forbid", strict=True)


class MinMax:
    """Exact extremes: nothing that was seen saturates."""

    order_dependent: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = MinMaxOptions

    def __init__(self, channels: int | None, options: MinMaxOptions, _: Codes) -> None:
        self.channels = channels
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        if rows.shape[0] == 0:
            return
        low, high = extremes(rows, self.channels)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self) -> tuple[Tensor, Tensor]:
        if self.low is None or self.high is None:
            raise nothing_seen()
        return self.low, self.high
