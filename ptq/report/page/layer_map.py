"""The layer map: errors by block and kind of layer, in a few levels of colour."""

from collections.abc import Sequence
from dataclasses import dataclass

from ptq.report.weights import block_and_kind

LEVELS = 7


@dataclass(frozen=True)
class Strip:
    """One list of blocks.

    Args:
        path: name of the list, "" for layers outside of blocks.
        kinds: of layers, in the model's order.
        blocks: numbers.
        cells: by (block, kind): indices of the layers there, the worst first.
    """

    path: str
    kinds: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: dict[tuple[int, str], tuple[int, ...]]


def strips(names: Sequence[str], errors: Sequence[float]) -> list[Strip]:
    """Layers sorted into strips.

    Args:
        errors: of each layer; the larger, the worse.
    """
    found: dict[str, dict[tuple[int, str], list[int]]] = {}
    for index, name in enumerate(names):
        path, block, kind = block_and_kind(name)
        found.setdefault(path, {}).setdefault((block or 0, kind), []).append(index)
    return [
        Strip(
            path,
            tuple(dict.fromkeys(kind for _, kind in cells)),
            tuple(sorted({block for block, _ in cells})),
            {
                place: tuple(sorted(indices, key=lambda i: -errors[i]))
                for place, indices in cells.items()
            },
        )
        for path, cells in found.items()
    ]


@dataclass(frozen=True)
class Scale:
    """Equal levels between two values."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], narrowest: float) -> "Scale":
        """From the least to the largest value, but at least so wide."""
        low, high = min(values), max(values)
        missing = max(0.0, narrowest - (high - low)) / 2
        return cls(low - missing, high + missing)

    def level(self, value: float) -> int:
        share = (value - self.low) / (self.high - self.low)
        return max(0, min(LEVELS - 1, int(LEVELS * share)))

    @property
    def edges(self) -> tuple[float, ...]:
        """Where levels begin and end."""
        return tuple(self.low + (self.high - self.low) * i / LEVELS for i in range(LEVELS + 1))


TOKEN_EDGES = (0.03, 0.1, 0.3, 1.0, 2.0, 4.0)
"""KL in nats where the levels of single tokens begin, but for the first."""


def token_level(kl: float) -> int:
    return sum(kl >= edge for edge in TOKEN_EDGES)
