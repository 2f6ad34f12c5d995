"""Modules that hold quantized weights."""

from ptq.modules.quant_linear import QuantLinear

__all__ = ["QuantLinear"]
