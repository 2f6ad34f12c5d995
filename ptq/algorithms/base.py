"""What an algorithm is given, and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ptq.config import WeightScheme
from ptq.core import QuantizedWeight


@dataclass(frozen=True, eq=False)
class InputMoments:
    """What calibration saw of one layer's input x [rows, K].

    Args:
        second: float32 [K, K], the mean of ``x^T x`` over the rows.
        cross: float32 [K, K], the mean of ``(x_float - x)^T x``, where x_float is the input that
            the float model has at the same token; None where it was not asked for.
        rows: tokens seen, padding not counted.
    """

    second: Tensor
    cross: Tensor | None
    rows: int


@dataclass(frozen=True)
class Outcome:
    """A quantized weight, and each remedy that was needed on the way (for the report)."""

    weight: QuantizedWeight
    notes: tuple[str, ...] = ()


class NoOptions(BaseModel):
    """None."""

    model_config = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Algorithm:
    """One way from a float weight to codes.

    Args:
        quantize: ``(weight [N, K] float, scheme, moments or None, options) -> Outcome``; the
            float weight is left as it is.
        options: the pydantic model of its options.
        needs_moments: it needs :class:`InputMoments` (without them: round to nearest, noted).
        needs_cross: and their ``cross``.
        orders_inputs: ``(scheme, options)``: whether the codes will have an ``input_order``.
        by_rows: the rows of a weight are quantized independently, so that layers which read the
            same input can be one weight, which saves time.
    """

    quantize: Callable[[Tensor, WeightScheme, InputMoments | None, Any], Outcome]
    options: type[BaseModel] = NoOptions
    needs_moments: bool = False
    needs_cross: bool = False
    by_rows: bool = False
    orders_inputs: Callable[[WeightScheme, Any], bool] = lambda scheme, options: False
