"""The numbers that codes can hold, and what is beyond them: saturation, apart from rounding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.diagnosis.suspect import Suspect
from ptq.formats import FORMATS, FloatFormat, Format
from ptq.sensitivity import Change, read_in


@dataclass(frozen=True, eq=False)
class Limits:
    """The ends of what codes hold, and how much farther rounding to the last code is no more of an
    error than anywhere else: half a step (of a floating-point format's last one).

    Args:
        low, high, slack: float32, of shapes that go with the numbers.
    """

    low: Tensor
    high: Tensor
    slack: Tensor

    @classmethod
    def of(cls, fmt: Format, scale: Tensor, zero_point: Tensor | None) -> "Limits":
        """Of codes with this scale, which may be negative, and zero point."""
        scale = scale.float()
        zero = 0.0 if zero_point is None else zero_point.float()
        ends = ((fmt.qmin - zero) * scale, (fmt.qmax - zero) * scale)
        slack = scale.abs() * (0.5 if not isinstance(fmt, FloatFormat) else 0.5 * fmt.qmax / 14)
        return cls(torch.minimum(*ends), torch.maximum(*ends), slack)

    def outside(self, x: Tensor) -> Tensor:
        """Which numbers saturate."""
        return (x > self.high + self.slack) | (x < self.low - self.slack)

    def clipped(self, x: Tensor) -> Tensor:
        """The numbers, those that saturate at their end and the others as they are."""
        return torch.where(self.outside(x), x.clamp(self.low, self.high), x)


def weight_limits(weight: QuantizedWeight) -> Limits:
    """Of the parts of a weight: [scale rows, scale columns, 1]."""
    zero = None if weight.zero_point is None else weight.zero_point.unsqueeze(-1)
    return Limits.of(weight.format, weight.scale.unsqueeze(-1), zero)


def input_limits(suspect: Suspect) -> Limits | None:
    """Of a static input; None where the range is the input's own."""
    weight, activations = suspect.layer.quantized_weight, suspect.layer.scheme.activations
    if activations is None or activations.mode == "dynamic":
        return None
    assert weight.input_scale is not None
    fmt = FORMATS[activations.format]
    return Limits.of(fmt, weight.input_scale, weight.input_zero_point)


def clipping(suspect: Suspect) -> Change:
    """What saturation alone does: weights and inputs beyond the ends of their codes at the ends,
    all others as they are in float."""
    weight = suspect.layer.quantized_weight
    split = weight.granularity.split(suspect.target)
    clipped = weight_limits(weight).clipped(split).reshape(weight.shape)
    if suspect.rows is not None:
        clipped = clipped * suspect.rows[:, None]
    limits = input_limits(suspect)
    if limits is None:
        return Change(suspect.space.restored(clipped))
    return Change(clipped, read_in(suspect.space, limits.clipped))
