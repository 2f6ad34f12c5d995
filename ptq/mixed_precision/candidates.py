"""Allocations that are carried out and compared, as a prediction alone does not decide.

Errors of few bits are more than the second order that a prediction has, and what layers do together
is more than their sum: the allocation that is best by prediction may lose to one that it thinks
little of, even to one scheme for all.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ptq.config import Scheme
from ptq.mixed_precision.choices import Option
from ptq.mixed_precision.problem import Problem


@dataclass(frozen=True)
class Candidate:
    """An allocation to measure.

    Args:
        name: what it is.
        chosen: option of each choice.
        scheme: of all layers but the ends, where it is one.
    """

    name: str
    chosen: list[int]
    scheme: Scheme | None = None


def candidates(problem: Problem, always: Iterable[Scheme], most: int) -> list[Candidate]:
    """What is worth measuring within the limits; each once, and an even one as such.

    Args:
        always: schemes that are tried as the one of all layers, where they fit; so is the one of
            the others that has the least divergence.
        most: that are not uniform.
    """
    always = set(always)
    even = uniform(problem)
    best = min(even, key=lambda c: problem.point(c.chosen).kl, default=None)
    searched = [
        Candidate("searched", problem.least_kl()),
        Candidate("searched for the text's loss", problem.least_change()),
        *_coarser(problem),
    ]
    found = [*(c for c in even if c is best or c.scheme in always), *searched[:most]]
    kept: dict[tuple[int, ...], Candidate] = {}
    for candidate in found:
        kept.setdefault(tuple(candidate.chosen), candidate)
    return list(kept.values())


def _coarser(problem: Problem) -> Iterator[Candidate]:
    """Without the options of the fewest bits, whose errors are the largest."""
    bits = sorted({_bits(o) for c in problem.space.choices for o in c.options if o.scheme})
    fewest = bits[0] if len(bits) > 1 else 0
    chosen = problem.least_kl_of(lambda _, option: _bits(option) != fewest)
    if fewest and chosen is not None:
        yield Candidate(f"searched without {fewest} bits", chosen)


def uniform(problem: Problem) -> list[Candidate]:
    """One scheme for all layers but the embedding and the head, each that is within the limits."""
    schemes = dict.fromkeys(o.scheme for c in problem.space.choices for o in c.options)
    made = [(scheme, _all_of(problem, scheme)) for scheme in schemes if scheme is not None]
    return [Candidate(f"uniform {s}", chosen, s) for s, chosen in made if chosen is not None]


def _all_of(problem: Problem, scheme: Scheme) -> list[int] | None:
    return problem.least_kl_of(lambda choice, option: choice.is_end or option.scheme == scheme)


def _bits(option: Option) -> int:
    """Of a weight's code; 32 of float."""
    return 32 if option.scheme is None else option.scheme.weights.number_format.bits
