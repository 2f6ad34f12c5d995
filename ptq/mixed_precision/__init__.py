"""Mixed precision: one scheme for each layer, chosen under a budget."""

from ptq.mixed_precision.budget import Budget, parse_budget, parse_budgets
from ptq.mixed_precision.result import LayerChoice, Measured, Point, SearchResult
from ptq.mixed_precision.run import search

__all__ = [
    "Budget",
    "LayerChoice",
    "Measured",
    "Point",
    "SearchResult",
    "parse_budget",
    "parse_budgets",
    "search",
]
