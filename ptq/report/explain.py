"""Which kernel serves which layer at which number of rows, and why the others do not."""

import html
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq.kernels import KERNELS, Kernel, RowRange, row_ranges
from ptq.kv_cache import cache_settings
from ptq.modules import quantized_layers


@dataclass(frozen=True)
class LayerKernels:
    """The layers that are served alike.

    Args:
        names: of the layers.
        shape: (out_features, in_features).
        ranges: which kernel serves which number of rows.
        extra_bytes: that all their kernels' own forms of the weight hold, together, once used.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    scheme: str
    ranges: tuple[RowRange, ...]
    extra_bytes: int


@dataclass(frozen=True)
class Explanation:
    """The kernels of a model, for one device and dtype of activations.

    Args:
        kv_cache: how ``model.generate`` keeps keys and values, in words; None for float.
    """

    device: str
    dtype: str
    layers: tuple[LayerKernels, ...]
    kv_cache: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "dtype": self.dtype,
            "kv_cache": self.kv_cache,
            "layers": [
                {
                    "names": list(group.names),
                    "shape": list(group.shape),
                    "scheme": group.scheme,
                    "extra_bytes": group.extra_bytes,
                    "kernels": [
                        {
                            "first_row": r.first,
                            "last_row": r.last,
                            "kernel": r.kernel,
                            "not": {name: why for name, why in r.refused},
                        }
                        for r in group.ranges
                    ],
                }
                for group in self.layers
            ],
        }

    def __str__(self) -> str:
        lines = [f"Kernels on {self.device} for {self.dtype} activations (M = rows of a call):"]
        for group in self.layers:
            n, k = group.shape
            lines.append(
                f"{n}x{k} {group.scheme}, {len(group.names)} layers such as {group.names[0]} "
                f"(+{group.extra_bytes / 1e6:.1f} MB for the kernels' own forms)"
            )
            for rows in group.ranges:
                lines.append(f"  {rows}")
                lines += [f"      not {name}: {why}" for name, why in _telling(rows, self.device)]
        if self.kv_cache is not None:
            lines.append(f"Key-value cache of model.generate: {self.kv_cache}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _telling(rows: RowRange, device: str) -> list[tuple[str, str]]:
    """The refusals by kernels of this device; that a CPU kernel is for CPUs says nothing."""
    return [
        (name, why)
        for name, why in rows.refused
        if not why.startswith("for C") or why.startswith("for CPUs") == (device == "cpu")
    ]


def _measured(tuned: tuple[tuple[int, Kernel], ...]) -> list[RowRange]:
    """The ranges that ptq.tune found."""
    ends = [first - 1 for first, _ in tuned[1:]]
    reason = (("the others", "slower here, or too large: measured by ptq.tune"),)
    return [
        RowRange(first, last, kernel.name, reason)
        for (first, kernel), last in zip(tuned, [*ends, None], strict=True)
    ]


def explain(
    model: nn.Module, *, device: str | None = None, dtype: torch.dtype | None = None
) -> Explanation:
    """Say which kernel serves each quantized layer.

    Args:
        device: of the activations (default: the model's).
        dtype: likewise.

    Raises:
        UnsupportedError: the model has no quantized layer.
    """
    layers = quantized_layers(model)
    first = next(iter(model.parameters()), None)
    device = torch.device(device or next(iter(layers.values())).codes.device).type
    dtype = dtype or (torch.float32 if first is None else first.dtype)
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        tuned = layer.tuned.get((device, dtype), ())
        alike[layer.spec(device, dtype, 1), str(layer.scheme), tuned].append(name)
    groups = []
    for (spec, scheme, tuned), names in alike.items():
        ranges = _measured(tuned) if tuned else row_ranges(spec)
        used = {r.kernel for r in ranges}
        extra = sum(k.extra_bytes(spec) for k in KERNELS if k.name in used)
        groups.append(
            LayerKernels(tuple(names), (spec.n, spec.k), scheme, tuple(ranges), extra * len(names))
        )
    cache = cache_settings(model)
    said = None if cache is None else str(cache)
    return Explanation(device, str(dtype).removeprefix("torch."), tuple(groups), said)
