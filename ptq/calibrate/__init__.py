"""Calibration: text to tokens, and what the layers see of them."""

from ptq.calibrate.capture import LayerStatistics, collect
from ptq.calibrate.documents import Document
from ptq.calibrate.inputs import batches_of
from ptq.calibrate.sources import load_documents
from ptq.calibrate.tokens import TokenSet, batches, calibration_tokens, evaluation_windows

__all__ = [
    "Document",
    "LayerStatistics",
    "TokenSet",
    "batches",
    "batches_of",
    "calibration_tokens",
    "collect",
    "evaluation_windows",
    "load_documents",
]
