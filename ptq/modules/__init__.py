"""Modules that hold quantized weights."""

from ptq.modules.quant_linear import QuantLinear
from ptq.modules.sharing import quantized_layers, share_inputs

__all__ = ["QuantLinear", "quantized_layers", "share_inputs"]
