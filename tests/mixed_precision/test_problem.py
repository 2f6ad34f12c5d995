"""Allocations under two figures, divergence and slope, against all that there are."""

import itertools
import random

import pytest

from ptq.config import preset
from ptq.mixed_precision.choices import Choice, Option, Space
from ptq.mixed_precision.problem import Problem
from ptq.mixed_precision.solve import Limit

SCHEMES = [preset(name) for name in ("w3a16-g64-asym", "w4a16-g64-asym", "w8a16")]


def made(seed: int, limit: float, fixed: tuple[float, float] = (0.0, 0.0)) -> Problem:
    """Five layers, three options each; slopes of both signs."""
    draw = random.Random(seed)
    options = tuple(Option(scheme, size) for scheme, size in zip(SCHEMES, (3, 4, 8), strict=True))
    space = Space(tuple(Choice((f"{i}",), 1, options) for i in range(5)), 0, {})
    kl = [[draw.uniform(0.5, 1), draw.uniform(0.2, 0.5), draw.uniform(0, 0.1)] for _ in range(5)]
    slopes = [[draw.uniform(-1.0, 0.4) * value for value in row] for row in kl]
    sizes = Limit("size", [[3.0, 4.0, 8.0]] * 5, limit, (1.0, ""))
    return Problem(space, kl, slopes, *fixed, [], (sizes,))


def every(problem: Problem) -> list[list[int]]:
    """All allocations within the limits."""
    bound = problem.limits[0]
    chosen = [list(c) for c in itertools.product(range(3), repeat=5)]
    return [c for c in chosen if problem.sum(bound.figures, c) <= bound.bound]


def change(problem: Problem, chosen: list[int]) -> float:
    return problem.sum(problem.kl, chosen) + problem.fixed_kl + abs(problem.loss(chosen))


@pytest.mark.parametrize("seed", range(6))
def test_the_loss_counts_as_much_as_the_divergence(seed: int) -> None:
    """Of those of few weights, the best: never worse than by divergence alone, and the optimum
    wherever the loss of that still rises."""
    problem = made(seed, 22)
    found = change(problem, problem.least_change())
    assert found <= change(problem, problem.least_kl()) + 1e-9
    best = min(every(problem), key=lambda c: change(problem, c))
    if problem.loss(min(every(problem), key=lambda c: 2 * problem.sum(problem.kl, c)
                        + problem.sum(problem.slopes, c))) > 0:  # fmt: skip
        assert found == pytest.approx(change(problem, best), rel=1e-4)
    assert problem.sum(problem.limits[0].figures, problem.least_change()) <= 22


def test_the_divergence_counts_beside_the_loss_that_it_is_part_of() -> None:
    """Of four options the third one leaves the loss where it is. Weighing the slopes alone beside
    the divergence would pass it over for the fourth, whose loss falls too far, or the second."""
    options = tuple(Option(preset(name), 1) for name in ("w3a16", "w4a16", "w5a16", "w6a16"))
    space = Space((Choice(("a",), 1, options),), 0, {})
    kl, slopes = [[1.0, 0.6, 2.0, 3.0]], [[0.5, 2.0, -2.0, -4.2]]
    problem = Problem(space, kl, slopes, 0.0, 0.0, [], ())
    assert min(range(4), key=lambda i: change(problem, [i])) == 2
    assert problem.least_change() == [2]


def test_what_is_fixed_has_a_loss_too() -> None:
    """Fixed layers lower the loss so much that nothing is to be gained from the others' slopes."""
    problem = made(0, 22, fixed=(0.0, -3.0))
    assert problem.loss(problem.least_kl()) == pytest.approx(
        problem.sum(problem.kl, problem.least_kl())
        + problem.sum(problem.slopes, problem.least_kl()) - 3.0
    )  # fmt: skip
    assert problem.sum(problem.slopes, problem.least_change()) >= problem.sum(
        problem.slopes, made(0, 22).least_change()
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("asked", [0.4, 0.8, 1.5])
def test_the_fewest_bytes_of_a_change(seed: int, asked: float) -> None:
    problem = made(seed, 40)

    def fits(chosen: list[int]) -> bool:
        kl = problem.sum(problem.kl, chosen)
        mean = kl + 0.5 * problem.sum(problem.slopes, chosen)
        return mean <= asked and kl <= 4 / 3 * asked

    sizes = {tuple(c): problem.sum(problem.limits[0].figures, c) for c in every(problem) if fits(c)}
    found = problem.least_bytes(asked)
    if not sizes:
        assert found == problem.least_kl()
    else:
        assert fits(found)
        assert problem.sum(problem.bytes, found) == min(sizes.values())
