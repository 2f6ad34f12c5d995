"""What a diagnosis found: a table, and ``diagnosis.json``."""

import html
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptq.diagnosis.cause import Cause
from ptq.diagnosis.inputs import Channel
from ptq.diagnosis.remedies import Remedy
from ptq.diagnosis.tokens import Token
from ptq.sensitivity import Measure

FILE = "diagnosis.json"
_LAYERS_SHOWN = 20
_REMEDIES_SHOWN = 6  # of a layer
_Table = tuple[str, Sequence[str], list[Sequence[str]]]


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer, quantized alone and in place.

    Args:
        kl: the divergence that it causes by its weights and its activations together.
        kl_clipping: by what saturates alone (weights and static inputs beyond their codes).
        sqnr_weights_db, sqnr_inputs_db, sqnr_outputs_db: signal-to-quantization-noise ratios; the
            outputs' for the float model's inputs; None where there is no noise.
        saturated_weights, saturated_inputs: shares beyond the ends of the codes.
        range_used: largest share of a static input range that a value reaches; None if dynamic.
        outlier_channels: of its input.
        fault: the codes are not those of the weight, or a static range does not fit the inputs:
            such layers come first, whatever their ``kl``.
        cause: the main one; ``detail`` says it in words.
    """

    layer: str
    scheme: str
    kl: float
    kl_weights: float
    kl_activations: float
    kl_clipping: float
    sqnr_weights_db: float | None
    sqnr_inputs_db: float | None
    sqnr_outputs_db: float | None
    saturated_weights: float
    saturated_inputs: float
    range_used: float | None
    outlier_channels: tuple[Channel, ...]
    fault: bool
    cause: Cause
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """Which layers damage a quantized model, why, and what helps.

    Args:
        layers: the worst first: those with a fault, then by ``kl``.
        tokens: outliers, by their hidden states in the float model.
        remedies: for the worst layers, in that order; of a layer, the largest gain first.
        whole_kl: the divergence of the whole quantized model.
        sum_of_layers: of the layers' own; the difference is what they do together.
        measure: ``kl_nats``, or ``output_error`` of what does not predict tokens.
        scored: tokens that were scored.
        quantized: how many layers are quantized, measured or not.
    """

    layers: tuple[LayerDiagnosis, ...]
    tokens: tuple[Token, ...]
    remedies: tuple[Remedy, ...]
    whole_kl: float
    sum_of_layers: float
    measure: Measure
    scored: int
    quantized: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "tokens_scored": self.scored,
            "whole_kl": self.whole_kl,
            "sum_of_layers": self.sum_of_layers,
            "layers": [asdict(layer) for layer in self.layers],
            "tokens": [asdict(token) for token in self.tokens],
            "remedies": [{**asdict(remedy), "gain": remedy.gain} for remedy in self.remedies],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def write(self, directory: str | Path) -> Path:
        """Write ``diagnosis.json`` into the directory, whole or not at all."""
        target = Path(directory) / FILE
        temporary = target.with_suffix(".json.tmp")
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, target)
        return target

    def __str__(self) -> str:
        parts = [_text(title, header, rows) for title, header, rows in self._tables()]
        return "\n\n".join([*parts, "\n".join(self._summary())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [_html(title, header, rows) for title, header, rows in self._tables()]
        return "".join([*parts, *(f"<p>{html.escape(line)}</p>" for line in self._summary())])

    def _tables(self) -> list[_Table]:
        shown = self.layers[:_LAYERS_SHOWN]
        left = len(self.layers) - len(shown)
        title = f"The worst {len(shown)} of {len(self.layers)} layers" if left else "Layers"
        unit = "KL (nats a token)" if self.measure == "kl_nats" else "relative output error"
        heading = f"{title}, each quantized alone; {unit}"
        tables: list[_Table] = [(heading, _LAYER_HEADER, _layer_rows(shown))]
        if self.remedies:
            tables.append(
                ("Remedies, each tried in place", _REMEDY_HEADER, _remedy_rows(self.remedies))
            )
        if self.tokens:
            tables.append(
                ("Outlier tokens of the float model", _TOKEN_HEADER, _token_rows(self.tokens))
            )
        return tables

    def _summary(self) -> list[str]:
        sum_ = f"whole model {self.whole_kl:.4g}, sum of the layers {self.sum_of_layers:.4g}"
        measured = f"Measured on {self.scored:,} tokens in {self.seconds:.0f} s."
        notes = [f"Note: {note}" for note in self.notes]
        if len(self.layers) < self.quantized:
            return [f"{sum_}, which are {len(self.layers)} of {self.quantized}.", measured, *notes]
        ratio = self.whole_kl / self.sum_of_layers if self.sum_of_layers else 1.0
        together = (
            "the layers' damage adds up"
            if 0.9 <= ratio <= 1.1
            else f"together the layers do {ratio:.2f} times that"
        )
        return [f"{sum_}: {together}.", measured, *notes]


_LAYER_HEADER = (
    "layer", "scheme", "all", "weights", "activations", "clipping", "dB weights", "dB inputs",
    "dB outputs", "cause",
)  # fmt: skip
_REMEDY_HEADER = ("layer", "remedy", "scheme", "before", "after", "bytes")
_TOKEN_HEADER = ("token", "window", "position", "largest after", "channel", "magnitude", "ratio")


def _layer_rows(layers: Iterable[LayerDiagnosis]) -> list[Sequence[str]]:
    return [
        (
            x.layer,
            x.scheme,
            *(f"{kl:.2e}" for kl in (x.kl, x.kl_weights, x.kl_activations, x.kl_clipping)),
            *(
                "" if db is None else f"{db:.1f}"
                for db in (x.sqnr_weights_db, x.sqnr_inputs_db, x.sqnr_outputs_db)
            ),
            f"{x.cause}: {x.detail}" if x.detail else x.cause,
        )
        for x in layers
    ]


def _remedy_rows(remedies: Iterable[Remedy]) -> list[Sequence[str]]:
    """Of each layer, the first few that help."""
    shown: Counter[str] = Counter()
    rows: list[Sequence[str]] = []
    for r in remedies:
        shown[r.layer] += 1
        if shown[r.layer] <= _REMEDIES_SHOWN and r.gain > 0:
            after = f"{r.kl_after:.2e}"
            rows.append((r.layer, r.remedy, r.scheme, f"{r.kl_before:.2e}", after, f"{r.bytes:+,}"))
    return rows


def _token_rows(tokens: Iterable[Token]) -> list[Sequence[str]]:
    return [
        (
            repr(t.text) if t.text is not None else str(t.id),
            str(t.window),
            str(t.position),
            t.block,
            str(t.channel),
            f"{t.magnitude:.3g}",
            f"{t.ratio:.0f}",
        )
        for t in tokens
    ]


def _text(title: str, header: Sequence[str], rows: list[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = (header, ["-" * width for width in widths], *rows)
    aligned = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join([title, *aligned])


def _html(title: str, header: Sequence[str], rows: list[Sequence[str]]) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<p>{html.escape(title)}</p><table>{row(header, 'th')}{body}</table>"
