"""Modules that hold quantized weights."""

from ptq.modules.buffers import buffers_of, weight_of
from ptq.modules.quant_embedding import QuantEmbedding
from ptq.modules.quant_linear import QuantLinear
from ptq.modules.sharing import quantized_layers, quantized_modules, share_inputs
from ptq.modules.tying import tie, tie_shared

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "buffers_of",
    "quantized_layers",
    "quantized_modules",
    "share_inputs",
    "tie",
    "tie_shared",
    "weight_of",
]
