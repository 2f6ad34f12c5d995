"""The allocation as numbers: what each option costs, and the best choice under the limits."""

from collections.abc import Callable
from dataclasses import dataclass

from ptq.mixed_precision.choices import Choice, Option, Space
from ptq.mixed_precision.result import Point
from ptq.mixed_precision.solve import Limit, Table, allocate, solve

Allowed = Callable[[Choice, Option], bool]

_CURVE = 13  # points
NATS = (1.0, "nats of predicted KL")
MEGABYTES = (1e-6, "MB")


@dataclass(frozen=True)
class Problem:
    """Options and their figures.

    Args:
        kl: predicted divergence of each option of each choice, nats.
        fixed_kl: of the layers that are not chosen for.
        milliseconds: likewise; empty where no budget is of time.
        limits: of the budgets, but for that of perplexity.
    """

    space: Space
    kl: Table
    fixed_kl: float
    milliseconds: Table
    limits: tuple[Limit, ...]

    @property
    def bytes(self) -> Table:
        return bytes_table(self.space)

    def least_kl(self) -> list[int]:
        """The options with the least divergence within the limits."""
        return allocate(self.kl, self.limits)

    def least_kl_of(self, allowed: Allowed) -> list[int] | None:
        """As :meth:`least_kl`, of the options that are allowed; None where the limits rule them
        out, or a choice has none of them."""
        forbidden = [
            [float(not allowed(choice, option)) for option in choice.options]
            for choice in self.space.choices
        ]
        none = Limit("options", forbidden, 0.5, (1.0, "options"))
        return solve(self.kl, [*self.limits, none])

    def least_bytes(self, kl: float) -> list[int]:
        """The options with the fewest bytes whose divergence is at most ``kl``; those of least
        divergence where that is too little for all."""
        least = self.least_kl()
        if self.sum(self.kl, least) + self.fixed_kl >= kl:
            return least
        bound = Limit("divergence", self.kl, kl - self.fixed_kl, NATS)
        return allocate(self.bytes, [*self.limits, bound])

    def sum(self, table: Table, chosen: list[int]) -> float:
        return sum(row[i] for row, i in zip(table, chosen, strict=True))

    def options(self, chosen: list[int]) -> list[tuple[Choice, Option]]:
        pairs = zip(self.space.choices, chosen, strict=True)
        return [(choice, choice.options[i]) for choice, i in pairs]

    def point(self, chosen: list[int]) -> Point:
        size = int(self.sum(self.bytes, chosen))
        return Point(
            size + self.space.fixed_bytes,
            8 * size / self.space.weights,
            self.sum(self.kl, chosen) + self.fixed_kl,
        )

    def curve(self) -> tuple[Point, ...]:
        """The best allocations of sizes from the least to the most, by equal ratios, without the
        budgets."""
        least, most = (sum(f(row) for row in self.bytes) for f in (min, max))
        points = []
        for i in range(_CURVE):
            bound = least * (most / least) ** (i / (_CURVE - 1)) * (1 + 1e-9)
            chosen = allocate(self.kl, [Limit("size", self.bytes, bound, MEGABYTES)])
            points.append(self.point(chosen))
        return tuple(dict.fromkeys(points))


def bytes_table(space: Space) -> Table:
    return [[float(option.bytes) for option in choice.options] for choice in space.choices]
