"""Recipes that look at nothing but the weight."""

from torch import Tensor

from ptq.config import WeightScheme
from ptq.core import QuantizedWeight
from ptq.recipe import Recipe


def quantize_plainly(recipe: Recipe, weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """The codes of a weight [N, K] by the recipe's algorithm."""
    return recipe.algorithm.quantize(weight.detach(), scheme, None, recipe.options).weight
