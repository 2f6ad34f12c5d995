"""Kernels: one file an op, tried in the order of this list; the reference serves everything."""

from ptq.kernels.activations import Activation, quantize_activation
from ptq.kernels.cpu_int4 import Int4Pack
from ptq.kernels.cpu_int8pack import Int8Pack
from ptq.kernels.cpu_int_mm import IntMM
from ptq.kernels.cpu_onednn import OneDnn
from ptq.kernels.cpu_two_digit import TwoDigit
from ptq.kernels.cuda import CudaInt4, CudaIntMM
from ptq.kernels.cuda_fp8 import CudaFloat8
from ptq.kernels.cuda_triton import TritonFloat, TritonInt8
from ptq.kernels.dequantize import DequantizeBlocks
from ptq.kernels.memory import aligned
from ptq.kernels.reference import Reference
from ptq.kernels.resident import Resident
from ptq.kernels.rotate import rotated
from ptq.kernels.select import KERNELS, RowRange, row_ranges, select
from ptq.kernels.spec import Kernel, LinearSpec

__all__ = [
    "KERNELS",
    "Activation",
    "CudaFloat8",
    "CudaInt4",
    "CudaIntMM",
    "DequantizeBlocks",
    "Int4Pack",
    "Int8Pack",
    "IntMM",
    "Kernel",
    "LinearSpec",
    "OneDnn",
    "Reference",
    "Resident",
    "RowRange",
    "TritonFloat",
    "TritonInt8",
    "TwoDigit",
    "aligned",
    "quantize_activation",
    "rotated",
    "row_ranges",
    "select",
]
