"""Pure functions and values: no modules, no files."""

from ptq.core.affine import QParams, choose_qparams, dequantize, quantize
from ptq.core.finite import is_finite
from ptq.core.granularity import Granularity
from ptq.core.packing import pack, packed_width, unpack
from ptq.core.quantized_weight import QuantizedWeight

__all__ = [
    "Granularity",
    "QParams",
    "QuantizedWeight",
    "choose_qparams",
    "dequantize",
    "is_finite",
    "pack",
    "packed_width",
    "quantize",
    "unpack",
]
