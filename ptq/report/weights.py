"""What quantizing did to each weight: its error, and its values on the grid before and after."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.formats import IntFormat

_ELEMENTS = 1 << 20  # that are looked at at a time
_BINS = 64
_HISTOGRAMS = 24  # in the report


def block_and_kind(name: str) -> tuple[str, int | None, str]:
    """Where a layer is: the list of blocks, its number there, and what it is in any block.

    >>> block_and_kind("model.layers.3.mlp.experts.7.up_proj")
    ('model.layers', 3, 'mlp.experts.*.up_proj')
    >>> block_and_kind("lm_head")
    ('', None, 'lm_head')
    """
    match = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", name)
    if match is None:
        return "", None, name
    return match[1] or "", int(match[2]), re.sub(r"(?<=\.)\d+(?=\.)", "*", match[3])


@dataclass(eq=False)
class WeightRecorder:
    """Sees each layer's weight with its codes, and keeps figures of fixed size."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def see(self, name: str, original: Tensor, weight: QuantizedWeight) -> None:
        """Record a layer; a second time (after a refinement) replaces the first.

        Args:
            original: the float weight [N, K] that the codes stand for.
        """
        lost, total = _energies(original, weight)
        relative = lost / total if total else None
        self.layers[name] = {
            "relative_squared_error": relative,
            "sqnr_db": -10 * math.log10(relative) if relative else None,
        }
        self.histograms[name] = _histogram(original, weight)

    def to_dict(self, most: int = _HISTOGRAMS) -> dict[str, Any]:
        """For JSON: the error of every layer, and the histograms of at most so many: of each kind
        of layer the one with the largest error, then the layers with the largest errors."""
        order = sorted(self.layers, key=self._error, reverse=True)
        first: dict[Any, str] = {}
        for name in order:
            path, _, kind = block_and_kind(name)
            first.setdefault((path, kind), name)
        chosen = list(dict.fromkeys([*first.values(), *order]))[:most]
        return {
            "layers": [{"name": name, **found} for name, found in self.layers.items()],
            "histograms": [{"name": name, **self.histograms[name]} for name in chosen],
        }

    def _error(self, name: str) -> float:
        return self.layers[name]["relative_squared_error"] or 0.0


def _pieces(original: Tensor, weight: QuantizedWeight) -> Iterator[tuple[Tensor, QuantizedWeight]]:
    """Some rows at a time, in float32 and in the order of their codes, with these: memory stays
    bounded."""
    step = max(1, _ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        values = weight.sorted(original[rows].float())
        yield (
            values,
            replace(
                weight,
                packed=weight.packed[rows],
                scale=_rows_of(weight.scale, rows),
                zero_point=None if weight.zero_point is None else _rows_of(weight.zero_point, rows),
                shape=(values.shape[0], values.shape[1]),
            ),
        )


def _rows_of(scale: Tensor, rows: slice) -> Tensor:
    return scale if scale.shape[0] == 1 else scale[rows]


def _energies(original: Tensor, weight: QuantizedWeight) -> tuple[float, float]:
    """Squared norm of the error and of the weight."""
    lost = total = 0.0
    for before, part in _pieces(original, weight):
        lost += (part.dequantize() - before).double().square().sum().item()
        total += before.double().square().sum().item()
    return lost, total


def _histogram(original: Tensor, weight: QuantizedWeight) -> dict[str, Any]:
    """Of the weights in units of their own step, so that the grid of all groups is one.

    ``before`` counts ``w / scale + zero point`` in equal bins from half a step below the lowest
    code to half a step above the highest; what is outside is in the outermost bins, and counted
    as ``clipped``. ``after`` counts the codes over the same range: a bar a code, or several codes
    a bar where there are more than 64.
    """
    fmt = weight.format
    half = 0.5 if isinstance(fmt, IntFormat) else 0.0
    low, high = fmt.qmin - half, fmt.qmax + half
    before = torch.zeros(_BINS, dtype=torch.int64)
    after = torch.zeros(min(_BINS, 1 << fmt.bits), dtype=torch.int64)
    clipped = 0
    for values, part in _pieces(original, weight):
        scaled = _in_steps(values, part)
        clipped += int(((scaled < low) | (scaled > high)).sum())
        _count(before, scaled, low, high)
        _count(after, part.codes.float(), low, high)
    return {
        "format": fmt.name,
        "low": low,
        "high": high,
        "clipped": clipped,
        "before": before.tolist(),
        "after": after.tolist(),
    }


def _in_steps(values: Tensor, weight: QuantizedWeight) -> Tensor:
    parts = weight.granularity.split(values) / weight.scale.float().unsqueeze(-1)
    if weight.zero_point is not None:
        parts += weight.zero_point.float().unsqueeze(-1)
    return parts


def _count(counts: Tensor, values: Tensor, low: float, high: float) -> None:
    """Add at most 16 million values, which float32 counts exactly, to the counts of equal bins."""
    found = values.clamp(low, high).histc(len(counts), low, high)
    counts += found.to(torch.int64).cpu()
