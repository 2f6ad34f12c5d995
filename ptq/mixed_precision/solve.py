"""One option for each group of layers, by integer programming (HiGHS, through scipy)."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ptq.errors import ConfigError, UnsupportedError

Table = Sequence[Sequence[float]]
"""A figure of each option of each group."""

_GAP = 1e-5  # of the optimum, proved
_SECONDS = 60.0


@dataclass(frozen=True)
class Limit:
    """The chosen options' figures may sum to at most ``bound``.

    Args:
        name: of the budget, for the error.
        unit: as ``1e-6`` and ``MB``: what a figure is multiplied with to be shown, and its unit.
        fixed: what is added to a sum to be shown.
    """

    name: str
    figures: Table
    bound: float
    unit: tuple[float, str]
    fixed: float = 0.0

    def show(self, value: float) -> str:
        scale, unit = self.unit
        return f"{(value + self.fixed) * scale:.4g} {unit}"


def allocate(cost: Table, limits: Sequence[Limit]) -> list[int]:
    """The options with the least cost in sum that keep every limit.

    A multiple-choice knapsack problem (Sinha and Zoltners 1979), solved as an integer program:
    the proved optimum, within 1e-5 of it.

    Args:
        cost: of each option of each group.

    Returns:
        The number of the chosen option, for each group.

    Raises:
        ConfigError: no choice keeps the limits; the message says what is possible.
        UnsupportedError: scipy is not installed.
    """
    for limit in limits:
        least = sum(min(row) for row in limit.figures)
        if least > limit.bound:
            most = sum(max(row) for row in limit.figures)
            raise ConfigError(
                f"budget {limit.name!r} cannot be met: the candidates give "
                f"{limit.show(least)} to {limit.show(most)}, {limit.show(limit.bound)} are asked "
                "for; raise it, or allow smaller schemes, or more layers"
            )
    chosen = solve(cost, limits)
    if chosen is None:
        raise ConfigError(_together(limits))
    return chosen


def _together(limits: Sequence[Limit]) -> str:
    """Each limit can be kept, all together cannot: the least of the last one under the others."""
    *others, last = limits
    best = solve(last.figures, others)
    names = ", ".join(repr(limit.name) for limit in others)
    if best is None:
        return f"budgets {names} cannot be met together; raise one"
    least = sum(row[i] for row, i in zip(last.figures, best, strict=True))
    return (
        f"budget {last.name!r} cannot be met together with {names}: the least is then "
        f"{last.show(least)}; raise one"
    )


def solve(cost: Table, limits: Sequence[Limit]) -> list[int] | None:
    """As :func:`allocate`; None where no choice keeps the limits."""
    optimize, sparse = _scipy()
    sizes = [len(row) for row in cost]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.arange(starts[-1])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    one_each = sparse.csr_array((np.ones(len(columns)), (owners, columns)))
    constraints = [optimize.LinearConstraint(one_each, 1, 1)]
    for limit in limits:
        row = _flat(limit.figures)
        scale = max(1e-300, abs(row).max())  # as the solver's tolerances are absolute
        constraints.append(
            optimize.LinearConstraint(row[None] / scale, -np.inf, limit.bound / scale)
        )
    # The gap is of the optimum: what every allocation pays is not part of it.
    objective = _flat([[value - min(row) for value in row] for row in cost])
    objective = objective / max(1e-300, objective.max()) * 1e3
    with _silent():
        found = optimize.milp(
            objective,
            integrality=np.ones(len(columns)),
            bounds=optimize.Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if found.status == 2:
        return None
    if found.x is None:
        raise UnsupportedError(f"the solver found no allocation: {found.message}")
    return [int(np.argmax(found.x[a:b])) for a, b in pairwise(starts)]


@contextmanager
def _silent() -> Iterator[None]:
    """Within it, nothing reaches the process' standard output: HiGHS prints lines of its own there,
    whatever its options say, from below Python's ``sys.stdout``."""
    sys.stdout.flush()
    with open(os.devnull, "wb") as nothing:
        own = os.dup(1)
        try:
            os.dup2(nothing.fileno(), 1)
            yield
        finally:
            os.dup2(own, 1)
            os.close(own)


def _flat(table: Table) -> Any:
    return np.array([value for row in table for value in row], dtype=float)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError:
        raise UnsupportedError(
            "the search needs scipy: pip install 'ptq-toolkit[search]'"
        ) from None
    return optimize, sparse
