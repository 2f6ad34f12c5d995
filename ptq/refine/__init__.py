"""Refinements: better codes for a block, judged by what the whole block gives."""

from ptq.algorithms import NoOptions
from ptq.refine.base import BlockJob, Finish, LayerState, Refinement, quantized_inputs
from ptq.refine.bias_correction import correct_biases
from ptq.refine.distill import DistillJob, DistillOptions, distill
from ptq.refine.learned_rounding import LearnedRoundingOptions, learn_rounding

REFINEMENTS: dict[str, Refinement] = {
    "learned_rounding": Refinement(learn_rounding, LearnedRoundingOptions),
    "bias_correction": Refinement(correct_biases, NoOptions),
}
"""Of a block, by the name in a recipe."""

FINISHES: dict[str, Finish] = {
    "distill": Finish(distill, DistillOptions),
}
"""Of the whole model, by the name in a recipe."""

__all__ = [
    "FINISHES",
    "REFINEMENTS",
    "BlockJob",
    "DistillJob",
    "Finish",
    "LayerState",
    "Refinement",
    "quantized_inputs",
]
