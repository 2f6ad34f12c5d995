"""GPTQ and AWQ: codes of a linear layer in 32-bit words, transposed."""

from ptq.checkpoint.packed_int32.read import METHODS, read
from ptq.checkpoint.packed_int32.settings import layout_name
from ptq.checkpoint.packed_int32.write import LAYOUTS, write

__all__ = ["LAYOUTS", "METHODS", "layout_name", "read", "write"]
