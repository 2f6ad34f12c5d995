"""Plots as paths of inline SVG: coordinates only; the style sheet has the colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 320, 120  # of a small plot, in its own units
_TOP = 14  # room for a word


@dataclass(frozen=True)
class Histogram:
    """Two distributions over one axis.

    Args:
        before: path of a filled area. after: path of bars or steps.
        grid: x of the values that the grid has, few enough to be drawn.
        ticks: (x, label) of the axis.
        lines: (x, label) of values that are pointed out.
    """

    before: str
    after: str
    grid: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]
    lines: tuple[tuple[float, str], ...] = ()


def weight_histogram(
    before: Sequence[int], after: Sequence[int], low: float, high: float
) -> Histogram:
    """Weights in steps of their grid: as densities, so that both areas are the same."""
    tallest = max(max(before) * len(before), max(after) * len(after), 1)

    def heights(counts: Sequence[int]) -> list[float]:
        return [count * len(counts) / tallest for count in counts]

    few = len(after) <= 32 and len(after) == round(high - low)
    first, last = math.ceil(low), math.floor(high)

    def x(value: float) -> float:
        return WIDTH * (value - low) / (high - low)

    return Histogram(
        _steps(heights(before), filled=True),
        _bars(heights(after)) if few else _steps(heights(after)),
        tuple(x(code) for code in range(first, last + 1)) if few else (),
        ((x(first), f"{first}"), (x(0), "0"), (x(last), f"{last}")),
    )


def magnitude_histogram(
    before: tuple[float, Sequence[int]],
    after: tuple[float, Sequence[int]] | None,
    per_octave: int,
    step: float | None,
) -> Histogram:
    """Magnitudes on logarithmic axes, both ways.

    Args:
        before, after: the power of two where the first bin begins, and the counts.
        step: of the grid; half of it is pointed out: what is smaller rounds to zero.
    """
    parts = [part for part in (before, after) if part is not None and part[1]]
    low = min((start for start, _ in parts), default=0.0)
    high = max((start + len(counts) / per_octave for start, counts in parts), default=low + 1)
    bins = round((high - low) * per_octave)
    tallest = max((math.log10(1 + max(counts)) for _, counts in parts), default=1.0)

    def heights(start: float, counts: Sequence[int]) -> list[float]:
        offset = round((start - low) * per_octave)
        values = [0.0] * bins
        for index, count in enumerate(counts):
            values[offset + index] = math.log10(1 + count) / tallest
        return values

    def x(power: float) -> float:
        return WIDTH * (power - low) / (high - low)

    every = max(1, math.ceil((high - low) / 4))
    powers = range(math.ceil(low), math.floor(high) + 1, every)
    half = () if not step else ((x(math.log2(step / 2)), "half a step"),)
    return Histogram(
        _steps(heights(*before), filled=True),
        "" if after is None else _steps(heights(*after)),
        (),
        tuple((x(power), _power(power)) for power in powers),
        tuple(line for line in half if 0 <= line[0] <= WIDTH),
    )


def _power(power: int) -> str:
    """A power of two as a number that fits under a tick."""
    return f"{2**power}" if power >= 0 else f"{2.0**power:.1g}"


def _y(share: float) -> float:
    return round(HEIGHT - (HEIGHT - _TOP) * share, 2)


def _steps(shares: Sequence[float], *, filled: bool = False) -> str:
    """The outline of adjoining bars; closed along the axis where it is to be filled."""
    width = WIDTH / len(shares)
    path = f"M0 {HEIGHT}" if filled else f"M0 {_y(shares[0])}"
    for index, share in enumerate(shares):
        path += f"V{_y(share)}H{round(width * (index + 1), 2)}"
    return f"{path}V{HEIGHT}Z" if filled else path


def _bars(shares: Sequence[float]) -> str:
    """Thin bars, each in the middle of its place."""
    width = WIDTH / len(shares)
    thin = round(width * 0.42, 2)
    return "".join(
        f"M{round(width * (index + 0.5) - thin / 2, 2)} {HEIGHT}V{_y(share)}h{thin}V{HEIGHT}Z"
        for index, share in enumerate(shares)
        if share
    )


@dataclass(frozen=True)
class Curve:
    """Points of size against divergence in a plot of its own size.

    Args:
        line: path through the points of the search.
        points, chosen, measured: (x, y) of each.
        x_ticks, y_ticks: (place, label).
    """

    width: int
    height: int
    line: str
    points: tuple[tuple[float, float], ...]
    chosen: tuple[float, float]
    measured: tuple[tuple[float, float], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def curve(
    points: Sequence[tuple[float, float]],
    chosen: tuple[float, float],
    measured: Sequence[tuple[float, float]],
) -> Curve:
    """Bytes against KL (nats), which is drawn on a logarithmic axis where all are positive."""
    width, height = 640, 300
    everything = [*points, chosen, *measured]
    logarithmic = all(kl > 0 for _, kl in everything)
    scaled = math.log10 if logarithmic else float
    left, right = _range([size for size, _ in everything])
    low, high = _range([scaled(kl) for _, kl in everything])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = width * (point[0] - left) / (right - left)
        return round(x, 1), round(height * (1 - (scaled(point[1]) - low) / (high - low)), 1)

    ordered = sorted(points)
    placed = [place(point) for point in ordered]
    x_values = [left + (right - left) * share for share in (0.1, 0.5, 0.9)]
    y_values = [low + (high - low) * share for share in (0.1, 0.5, 0.9)]
    return Curve(
        width,
        height,
        "M" + "L".join(f"{x} {y}" for x, y in placed),
        tuple(placed),
        place(chosen),
        tuple(place(point) for point in measured),
        tuple((width * share, f"{value / 1e6:.1f} MB")
              for share, value in zip((0.1, 0.5, 0.9), x_values, strict=True)),
        tuple((height * (1 - share), f"{10**value if logarithmic else value:.2g}")
              for share, value in zip((0.1, 0.5, 0.9), y_values, strict=True)),
    )  # fmt: skip


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values with a margin on either side."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    return low - margin, high + margin
