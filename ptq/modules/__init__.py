"""Modules that hold quantized weights."""

from ptq.modules.quant_linear import QuantLinear
from ptq.modules.sharing import share_inputs

__all__ = ["QuantLinear", "share_inputs"]
