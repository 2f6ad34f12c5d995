"""Evaluation: perplexity, divergence from the float model, and generated text."""

from ptq.evaluation.compare import compare, evaluate
from ptq.evaluation.generate import Sample, encode_prompt, require_generation, sample
from ptq.evaluation.in_text import pieces, tokens_in_text
from ptq.evaluation.logits import ReferenceLogits, window_logits
from ptq.evaluation.result import Evaluation, Perplexity, Protocol
from ptq.evaluation.speed import race

__all__ = [
    "Evaluation",
    "Perplexity",
    "Protocol",
    "ReferenceLogits",
    "Sample",
    "compare",
    "encode_prompt",
    "evaluate",
    "pieces",
    "race",
    "require_generation",
    "sample",
    "tokens_in_text",
    "window_logits",
]
