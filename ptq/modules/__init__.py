"""Modules that hold quantized weights."""

from ptq.modules.input_rotation import (
    input_rotation,
    remove_input_rotation,
    rotate_inputs,
)
from ptq.modules.quant_embedding import QuantEmbedding
from ptq.modules.quant_linear import QuantLinear
from ptq.modules.sharing import quantized_layers, quantized_modules, share_inputs
from ptq.modules.tying import tie, tie_shared

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "input_rotation",
    "quantized_layers",
    "quantized_modules",
    "remove_input_rotation",
    "rotate_inputs",
    "share_inputs",
    "tie",
    "tie_shared",
]
