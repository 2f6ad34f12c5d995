"""Pure functions and values: no modules, no files."""

from ptq.core.affine import QParams, choose_qparams, dequantize, quantize
from ptq.core.exporting import is_exporting
from ptq.core.fast_products import FastProducts
from ptq.core.finite import is_finite
from ptq.core.granularity import Granularity
from ptq.core.hadamard import hadamard
from ptq.core.packing import pack, packed_width, unpack
from ptq.core.product import product
from ptq.core.quantized_weight import QuantizedWeight
from ptq.core.rotation import Rotation
from ptq.core.rows import join_rows, split_rows

__all__ = [
    "FastProducts",
    "Granularity",
    "QParams",
    "QuantizedWeight",
    "Rotation",
    "choose_qparams",
    "dequantize",
    "hadamard",
    "is_exporting",
    "is_finite",
    "join_rows",
    "pack",
    "packed_width",
    "product",
    "quantize",
    "split_rows",
    "unpack",
]
