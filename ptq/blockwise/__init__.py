"""Recipes that look at data, carried out block by block."""

from ptq.blockwise.plain import quantize_plainly
from ptq.blockwise.run import Blockwise

__all__ = ["Blockwise", "quantize_plainly"]
