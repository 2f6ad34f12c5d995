"""The allocation as numbers: what each option costs, and the best choice under the limits."""

from collections.abc import Callable
from dataclasses import dataclass

from ptq.mixed_precision.choices import Choice, Option, Space
from ptq.mixed_precision.result import Point
from ptq.mixed_precision.solve import Limit, Table, allocate, solve

Allowed = Callable[[Choice, Option], bool]

_CURVE = 13  # points
_WEIGHTS = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0)  # of the loss, in allocations that are compared
_MORE = 4 / 3  # divergence that a falling loss may make up for
NATS = (1.0, "nats of predicted KL")
MEGABYTES = (1e-6, "MB")


@dataclass(frozen=True)
class Problem:
    """Options and their figures.

    Args:
        kl: predicted divergence of each option of each choice, nats.
        slopes: the change of the text's loss that goes with it, to first order, nats.
        fixed_kl, fixed_slope: of the layers that are not chosen for.
        milliseconds: likewise; empty where no budget is of time.
        limits: of the budgets, but for that of perplexity.
    """

    space: Space
    kl: Table
    slopes: Table
    fixed_kl: float
    fixed_slope: float
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

    def least_change(self) -> list[int]:
        """The options with the least sum of the divergence and of how far the text's loss moves,
        up or down, within the limits.

        A loss that rises by L costs KL + L, one that falls KL - L; between the two is the optimum
        of KL + w L for some w between -1 and 1 (Lagrange): few of them are compared.
        """

        def change(chosen: list[int]) -> float:
            return self.sum(self.kl, chosen) + self.fixed_kl + abs(self.loss(chosen))

        found = [
            allocate(_weighted((1 + w, self.kl), (w, self.slopes)), self.limits) for w in _WEIGHTS
        ]
        return min(found, key=change)

    def loss(self, chosen: list[int]) -> float:
        """How far the text's loss rises, to second order, nats: first order and divergence."""
        of_kl = self.sum(self.kl, chosen) + self.fixed_kl
        return of_kl + self.sum(self.slopes, chosen) + self.fixed_slope

    def least_bytes(self, change: float) -> list[int]:
        """The options with the fewest bytes of which the mean of divergence and rise of the loss is
        at most ``change``, nats; those of least divergence where that is too little for all.

        The divergence itself is at most a third more, so at most about twice the rise: no
        perplexity is bought with predictions that differ.
        """
        mean = _weighted((1.0, self.kl), (0.5, self.slopes))
        fixed = self.fixed_kl + 0.5 * self.fixed_slope
        bounds = [
            Limit("change", mean, change - fixed, NATS),
            Limit("divergence", self.kl, _MORE * change - self.fixed_kl, NATS),
        ]
        return solve(self.bytes, [*self.limits, *bounds]) or self.least_kl()

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


def _weighted(*parts: tuple[float, Table]) -> Table:
    """The sum of tables, each times its weight."""
    tables = [[[weight * value for value in row] for row in table] for weight, table in parts]
    return [
        [sum(values) for values in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)
    ]


def bytes_table(space: Space) -> Table:
    return [[float(option.bytes) for option in choice.options] for choice in space.choices]
