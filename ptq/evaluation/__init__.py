"""Evaluation: perplexity, divergence from the float model, and generated text."""

from ptq.evaluation.compare import compare, evaluate
from ptq.evaluation.encoder import Similarity, compare_embeddings, embed
from ptq.evaluation.gate import (
    Condition,
    figure_names,
    parse_conditions,
    require_none,
    violations,
)
from ptq.evaluation.generate import Sample, encode_prompt, require_generation, sample
from ptq.evaluation.images import ImageAgreement, ImageSet, classify, compare_classes
from ptq.evaluation.in_text import pieces, tokens_in_text
from ptq.evaluation.kind import Kind, evaluated_as
from ptq.evaluation.logits import ReferenceLogits, window_logits
from ptq.evaluation.others import RESULTS, HeldReference, evaluation_data, known_figures
from ptq.evaluation.result import Evaluation, Perplexity, Protocol
from ptq.evaluation.speed import race
from ptq.evaluation.tasks import (
    TaskComparison,
    TaskResults,
    accuracies,
    answers,
    compare_answers,
    require_lm_eval,
)

__all__ = [
    "RESULTS",
    "Condition",
    "Evaluation",
    "HeldReference",
    "ImageAgreement",
    "ImageSet",
    "Kind",
    "Perplexity",
    "Protocol",
    "ReferenceLogits",
    "Sample",
    "Similarity",
    "TaskComparison",
    "TaskResults",
    "accuracies",
    "answers",
    "classify",
    "compare",
    "compare_answers",
    "compare_classes",
    "compare_embeddings",
    "embed",
    "encode_prompt",
    "evaluate",
    "evaluated_as",
    "evaluation_data",
    "figure_names",
    "known_figures",
    "parse_conditions",
    "pieces",
    "race",
    "require_generation",
    "require_lm_eval",
    "require_none",
    "sample",
    "tokens_in_text",
    "violations",
    "window_logits",
]
