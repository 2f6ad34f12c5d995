"""Calibration: text to tokens, and what the layers see of them."""

from ptq.calibrate.capture import LayerStatistics, collect
from ptq.calibrate.chain import BlockCall, NotAChain
from ptq.calibrate.documents import Document
from ptq.calibrate.inputs import batches_of, call
from ptq.calibrate.inside import inputs_of, inputs_of_model, watching
from ptq.calibrate.sentences import evaluation_sentences, split_sentences
from ptq.calibrate.sources import load_documents
from ptq.calibrate.stream import (
    BlockStream,
    Progress,
    advance,
    capture,
    outputs_after_blocks,
)
from ptq.calibrate.tokens import (
    TokenSet,
    batches,
    calibration_tokens,
    evaluation_windows,
    overlap,
)

__all__ = [
    "BlockCall",
    "BlockStream",
    "Document",
    "LayerStatistics",
    "NotAChain",
    "Progress",
    "TokenSet",
    "advance",
    "batches",
    "batches_of",
    "calibration_tokens",
    "call",
    "capture",
    "collect",
    "evaluation_sentences",
    "evaluation_windows",
    "inputs_of",
    "inputs_of_model",
    "load_documents",
    "outputs_after_blocks",
    "overlap",
    "split_sentences",
    "watching",
]
