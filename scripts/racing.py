"""Timing candidates against each other in one process: they take turns, ratios are of one turn."""

import random
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch


def timed(action: Callable[[], object]) -> float:
    """Seconds that a call takes, until a GPU has done what it was given too."""
    waits = torch.cuda.is_initialized()
    if waits:
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if waits:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(
    candidates: dict[str, Callable[[], float]], seconds: float, turns: int = 5
) -> dict[str, list[float]]:
    """Times of each candidate, taken in turns; each returns its own seconds.

    The order is another one in each turn: what ran before decides what is in the caches.

    Args:
        seconds, turns: both at least, for all candidates together and for each of them.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < turns:
        shuffle(order)
        for name in order:
            times[name].append(candidates[name]())
    return times


def compared(times: dict[str, list[float]], name: str, bases: tuple[str, ...]) -> dict[str, Any]:
    """Median milliseconds of a candidate, and its speed over each base with the 10th to 90th
    percentile of the turns' ratios."""
    found: dict[str, Any] = {"milliseconds": 1e3 * median(times[name])}
    for base in bases:
        ratios = [b / t for b, t in zip(times[base], times[name], strict=True)]
        deciles = quantiles(ratios, n=10, method="inclusive")
        found[f"speed_over_{base}"] = median(ratios)
        found[f"spread_over_{base}"] = [deciles[0], deciles[-1]]
    return found


def speeds(row: dict[str, Any]) -> str:
    """The figures of :func:`compared`, for a line of a table."""
    line = f"{row['milliseconds']:9.3f} ms"
    for key in row:
        if key.startswith("speed_over_"):
            base = key.removeprefix("speed_over_")
            low, high = row[f"spread_over_{base}"]
            line += f"  {row[key]:5.2f}x {base} [{low:.2f}, {high:.2f}]"
    return line
