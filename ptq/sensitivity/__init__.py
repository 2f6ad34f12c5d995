"""Sensitivity: what each layer, quantized alone, does to the model's predictions."""

from ptq.sensitivity.change import Change, Part, change_of, change_of_layer, changed, rounded_input
from ptq.sensitivity.distance import Distances, Measure, divergence
from ptq.sensitivity.exact import LayerDivergence, exact_divergence
from ptq.sensitivity.in_place import InPlace

__all__ = [
    "Change",
    "Distances",
    "InPlace",
    "LayerDivergence",
    "Measure",
    "Part",
    "change_of",
    "change_of_layer",
    "changed",
    "divergence",
    "exact_divergence",
    "rounded_input",
]
