"""Sensitivity: what each layer, quantized alone, does to the model's predictions."""

from ptq.sensitivity.change import (
    Change,
    InputSpace,
    Part,
    change_of,
    changed,
    read_in,
    round_trip,
)
from ptq.sensitivity.distance import Distances, Measure, divergence
from ptq.sensitivity.exact import LayerDivergence, exact_divergence
from ptq.sensitivity.in_place import InPlace

__all__ = [
    "Change",
    "Distances",
    "InPlace",
    "InputSpace",
    "LayerDivergence",
    "Measure",
    "Part",
    "change_of",
    "changed",
    "divergence",
    "exact_divergence",
    "read_in",
    "round_trip",
]
