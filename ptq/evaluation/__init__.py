"""Evaluation: perplexity, divergence from the float model, and generated text."""

from ptq.evaluation.compare import compare, evaluate
from ptq.evaluation.generate import Sample, sample
from ptq.evaluation.logits import ReferenceLogits, window_logits
from ptq.evaluation.result import Evaluation, Perplexity, Protocol

__all__ = [
    "Evaluation",
    "Perplexity",
    "Protocol",
    "ReferenceLogits",
    "Sample",
    "compare",
    "evaluate",
    "sample",
    "window_logits",
]
