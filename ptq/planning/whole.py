"""What will happen to every layer, and what that comes to."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ptq.config import ActivationScheme, Scheme
from ptq.planning.sizes import megabytes


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one module.

    Args:
        name, kind, shape: of the module and its weight.
        parameters: that it owns; a weight shared with an earlier module counts there.
        scheme: None where it stays in float.
        reason: why it stays in float, or "" .
        decided_by: the rule or default that decided.
        bytes_before: of its tensors in the output dtype, unquantized.
        bytes_after: of its tensors in the checkpoint.
        looked_up: it is an embedding.
        shares: name of the quantized embedding that a tied output head shares, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    scheme: Scheme | None
    reason: str
    decided_by: str
    bytes_before: int
    bytes_after: int
    looked_up: bool = False
    shares: str | None = None

    @property
    def outcome(self) -> str:
        """The scheme's name, or 'float' and why."""
        return str(self.scheme) if self.scheme is not None else f"float: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "parameters": self.parameters,
            "scheme": None if self.scheme is None else str(self.scheme),
            "reason": self.reason,
            "decided_by": self.decided_by,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class Plan:
    """All layers, in the model's order; prints as a table, the repeated layers folded."""

    layers: tuple[LayerPlan, ...]
    dtype: torch.dtype

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Scheme of each linear layer that is quantized by itself."""
        return {
            layer.name: layer.scheme
            for layer in self.layers
            if layer.scheme is not None and not layer.looked_up and layer.shares is None
        }

    @property
    def embeddings(self) -> dict[str, Scheme]:
        """Scheme of each embedding that is quantized."""
        return {x.name: x.scheme for x in self.layers if x.scheme is not None and x.looked_up}

    @property
    def sharing(self) -> dict[str, str]:
        """Output heads that share the quantized embedding, which is named."""
        return {layer.name: layer.shares for layer in self.layers if layer.shares is not None}

    @property
    def static_layers(self) -> dict[str, ActivationScheme]:
        """Layers whose input scale must come from calibration, and how they are quantized."""
        return {
            name: scheme.activations
            for name, scheme in self.schemes.items()
            if scheme.activations is not None and scheme.activations.mode == "static"
        }

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def quantized_share(self) -> float:
        """Fraction of the parameters that are quantized."""
        return sum(layer.parameters for layer in self.quantized) / max(1, self.parameters)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def compression(self) -> float:
        return self.bytes_before / max(1, self.bytes_after)

    def to_dict(self) -> dict[str, Any]:
        return {
            "dtype_of_float_tensors": _dtype_name(self.dtype),
            "parameters": self.parameters,
            "quantized_share_of_parameters": self.quantized_share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "compression": self.compression,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __str__(self) -> str:
        return self.table()

    def table(self, full: bool = False) -> str:
        """Aligned text; ``full`` gives each layer a row of its own."""
        rows = _rows(self.layers, full)
        widths = [max(len(row[i]) for row in (_HEADER, *rows)) for i in range(len(_HEADER))]
        lines = [
            "  ".join(
                cell.rjust(width) if i in _RIGHT else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (_HEADER, tuple("-" * w for w in widths), *rows)
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """Two lines: what is quantized, and the sizes."""
        float32 = self.parameters * 4
        return (
            f"{len(self.quantized)} of {len(self.layers)} modules and "
            f"{100 * self.quantized_share:.1f}% of {self.parameters:,} parameters are quantized.\n"
            f"{megabytes(self.bytes_before)} ({_dtype_name(self.dtype)}) -> "
            f"{megabytes(self.bytes_after)}: "
            f"{self.compression:.2f}x smaller; "
            f"{float32 / max(1, self.bytes_after):.2f}x against float32."
        )

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in _rows(self.layers, full=False))
        summary = html.escape(self.summary()).replace("\n", "<br>")
        return f"<table>{row(_HEADER, 'th')}{body}</table><p>{summary}</p>"


_HEADER = (
    "layer",
    "x",
    "kind",
    "shape",
    "parameters",
    "MB before",
    "MB after",
    "scheme",
    "decided by",
)


_RIGHT = {1, 4, 5, 6}


def _rows(layers: Iterable[LayerPlan], full: bool) -> list[tuple[str, ...]]:
    """Cells of the table; layers that differ only in a number of their name share a row."""
    folded: dict[Any, list[LayerPlan]] = {}
    for layer in layers:
        name = layer.name if full else re.sub(r"\b\d+\b", "*", layer.name)
        key = (name, layer.kind, layer.shape, layer.outcome, layer.decided_by, layer.parameters > 0)
        folded.setdefault(key, []).append(layer)
    return [
        (
            (members[0].name if len(members) == 1 else key[0]) or "(model)",
            str(len(members)),
            key[1],
            "x".join(map(str, key[2])),
            f"{sum(m.parameters for m in members):,}",
            f"{sum(m.bytes_before for m in members) / 1e6:.2f}",
            f"{sum(m.bytes_after for m in members) / 1e6:.2f}",
            key[3],
            key[4],
        )
        for key, members in folded.items()
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
