"""Modules that hold quantized weights."""

from ptq.modules.buffers import buffers_of, weight_of
from ptq.modules.input_rotation import (
    InputRotation,
    input_rotation,
    read_rotated,
    remove_input_rotation,
    rotate_inputs,
)
from ptq.modules.joint import join, readers_of_one_tensor
from ptq.modules.quant_embedding import QuantEmbedding
from ptq.modules.quant_linear import QuantLinear
from ptq.modules.sharing import quantized_layers, quantized_modules, share_inputs
from ptq.modules.tying import tie, tie_shared

__all__ = [
    "InputRotation",
    "QuantEmbedding",
    "QuantLinear",
    "buffers_of",
    "input_rotation",
    "join",
    "quantized_layers",
    "quantized_modules",
    "read_rotated",
    "readers_of_one_tensor",
    "remove_input_rotation",
    "rotate_inputs",
    "share_inputs",
    "tie",
    "tie_shared",
    "weight_of",
]
