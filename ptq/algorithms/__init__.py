"""Algorithms: a float weight, and what calibration saw of its input, to a QuantizedWeight."""

from collections.abc import Callable

from torch import Tensor

from ptq.algorithms.inputs import with_static_input
from ptq.algorithms.rtn import round_to_nearest
from ptq.config import WeightScheme
from ptq.core import QuantizedWeight

ALGORITHMS: dict[str, Callable[[Tensor, WeightScheme], QuantizedWeight]] = {
    "rtn": round_to_nearest,
}

__all__ = ["ALGORITHMS", "round_to_nearest", "with_static_input"]
