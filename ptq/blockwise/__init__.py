"""Recipes that look at data, carried out block by block."""

from ptq.blockwise.keep import empty
from ptq.blockwise.plain import quantize_plainly
from ptq.blockwise.run import Blockwise
from ptq.blockwise.store import Reached, Store

__all__ = ["Blockwise", "Reached", "Store", "empty", "quantize_plainly"]
