"""Diagnosing a quantized model: each layer alone, in the float model's place."""

import copy
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate import TokenSet, evaluation_windows
from ptq.config import EvaluationConfig, QuantizationConfig, Scheme, make_section
from ptq.diagnosis.align import align
from ptq.diagnosis.cause import Divergences, cause_of
from ptq.diagnosis.inputs import InputFindings, inputs, watch_inputs
from ptq.diagnosis.ranges import clipping
from ptq.diagnosis.remedies import Remedy, try_remedies
from ptq.diagnosis.result import Diagnosis, LayerDiagnosis
from ptq.diagnosis.suspect import Suspect, pair
from ptq.diagnosis.tokens import outlier_tokens
from ptq.diagnosis.weights import WeightFindings, examine
from ptq.errors import CalibrationError, ConfigError
from ptq.model import unfolded
from ptq.modules import QuantEmbedding, quantized_modules
from ptq.pipeline import quantize
from ptq.planning import matches
from ptq.report import Console
from ptq.sensitivity import InPlace

_CHANNEL_RATIO = 20.0  # from which an input channel is an outlier
_TOKEN_RATIO = 20.0  # and a token
_ATTEMPTS = 14  # remedies of a layer, at most


def diagnose(
    model: nn.Module,
    data: str | os.PathLike[str] | Sequence[str] | TokenSet | Iterable[Any],
    quantized: nn.Module | str | dict[str, Any] | Scheme | QuantizationConfig,
    *,
    tokenizer: Any = None,
    layers: str = "*",
    windows: int = 2,
    context: int = 128,
    top: int = 5,
    calibration: Iterable[Any] | None = None,
    console: Console | None = None,
) -> Diagnosis:
    """Which layers damage a quantized model, by what, and what helps.

    Each layer takes the place of the float one, alone: by its weights, by its activations, by both,
    and by what saturates. For the worst layers remedies are tried in the same way. The float
    model is left as it was, bit for bit. A run costs at most one pass of the model over the
    windows; an upper bound on the time is said before the first.

    Args:
        model: float; float32 is best (see :func:`ptq.sensitivity.exact_divergence`).
        data: text files with ``tokenizer``, as in :func:`ptq.evaluate`; or windows of tokens, or
            batches as calibration takes them.
        quantized: a model that ptq quantized or loaded; or what :func:`ptq.quantize` takes, for
            a copy of the model.
        layers: a glob over layer names, or ``re:`` and a regular expression: those to measure.
        windows: of text, how many.
        context: tokens of a window.
        top: the worst layers, for which remedies are tried.
        calibration: batches, for schemes and recipes that need them.

    Raises:
        ConfigError: no layer matches.
        CalibrationError: the data cannot be used.
        ModelError: float and quantized model do not belong together.
        UnsupportedError: there is nothing to diagnose.
    """
    start = time.perf_counter()
    console = console or Console("quiet")
    tokens = _windows(data, tokenizer, windows, context)
    if not isinstance(quantized, nn.Module):
        made = copy.deepcopy(model)
        quantize(made, quantized, calibration=calibration, tokenizer=tokenizer, console=console)
        quantized = made
    names = [name for name, _ in quantized_modules(quantized).items()]
    with unfolded(model, names), torch.no_grad():
        pairs = pair(model, quantized)
        suspects = _chosen(pairs, layers)
        before = time.perf_counter()
        in_place = InPlace(model, tokens)
        work = _Work(in_place, quantized, suspects, console, time.perf_counter() - before)
        found = work.layers(top)
        remedies = work.remedies(found[:top])
        whole = in_place.distance_of(quantized)
        outlying = outlier_tokens(in_place, tokenizer, _TOKEN_RATIO)
    return Diagnosis(
        tuple(found),
        outlying,
        tuple(remedies),
        whole,
        sum(layer.kl for layer in found),
        in_place.measure,
        in_place.tokens,
        len(pairs),
        time.perf_counter() - start,
        tuple(_notes(quantized, in_place, work.mixed)),
    )


def _windows(data: Any, tokenizer: Any, windows: int, context: int) -> Any:
    """Token windows of text; anything else as it is."""
    if isinstance(data, str | os.PathLike):
        data = [data]
    if not (isinstance(data, list | tuple) and data and isinstance(data[0], str | os.PathLike)):
        return data
    if tokenizer is None:
        raise CalibrationError("diagnosing on text needs a tokenizer: pass tokenizer=...")
    sources = [os.fspath(source) for source in data]
    section = make_section(
        EvaluationConfig, "diagnose", data=sources, windows=windows, context=context
    )
    return evaluation_windows(section, tokenizer)


def _chosen(suspects: list[Suspect], pattern: str) -> dict[str, Suspect]:
    chosen = {s.name: s for s in suspects if matches(pattern, s.name)}
    if not chosen:
        raise ConfigError(
            f"layers {pattern!r} matches none of the {len(suspects)} quantized layers, such as "
            f"{suspects[0].name}"
        )
    return chosen


@dataclass(eq=False)
class _Work:
    """The runs, and how long they take.

    Args:
        seconds: that preparing took, which is more than one pass of the model.
    """

    in_place: InPlace
    quantized: nn.Module
    suspects: dict[str, Suspect]
    console: Console
    seconds: float
    seen: dict[str, InputFindings] = field(default_factory=dict, init=False)
    mixed: list[str] = field(default_factory=list, init=False)
    """Layers that cannot be compared with the float ones."""

    def layers(self, top: int) -> list[LayerDiagnosis]:
        """Every layer, the worst first."""
        weights = self._examined()
        runs = sum(self._runs(name, weights[name]) for name in self.suspects)
        tried = min(top, len(self.suspects)) * _ATTEMPTS
        self.console.say(
            f"{len(self.suspects)} layers on {self.in_place.tokens:,} tokens: {runs} runs, and up "
            f"to {tried} of remedies; at most {(runs + tried) * self.seconds / 60:.1f} minutes "
            "at the speed of the first one"
        )
        self.console.stage_name = "diagnose"
        bar = self.console.bar("layer")
        found = [self._layer(name, weights[name]) for name in bar(self.suspects)]
        return sorted(found, key=lambda x: (not x.fault, -x.kl))

    def _examined(self) -> dict[str, WeightFindings]:
        """The weights of every layer; those of blocks with strange ones are looked at again
        with the scales that a recipe gave them."""
        self.seen = watch_inputs(self.in_place, self.suspects, _CHANNEL_RATIO)
        weights = {n: examine(s, self.seen[n].excess) for n, s in self.suspects.items()}
        blocks = {self.in_place.block_of(n) for n, w in weights.items() if w.strange}
        for position in sorted(b for b in blocks if b is not None):
            inside = {
                n: s for n, s in self.suspects.items() if self.in_place.block_of(n) == position
            }
            aligned, mixed = align(self.in_place, self.quantized, inside, position)
            for name in mixed:
                del aligned[name], self.suspects[name], weights[name]
            self.mixed += mixed
            self.seen |= watch_inputs(self.in_place, aligned, _CHANNEL_RATIO)
            self.suspects |= aligned
            weights |= {n: examine(s, self.seen[n].excess) for n, s in aligned.items()}
        return weights

    def _saturates(self, name: str, weights: WeightFindings) -> bool:
        return weights.saturated > 0 or self.seen[name].saturated > 0

    def _runs(self, name: str, weights: WeightFindings) -> int:
        rounds = self.suspects[name].layer.scheme.activations is not None
        return (3 if rounds else 1) + self._saturates(name, weights)

    def _layer(self, name: str, weights: WeightFindings) -> LayerDiagnosis:
        suspect, inside = self.suspects[name], self.seen[name]
        of_weights = self.in_place.distance({name: suspect.change("weights")})
        of_inputs, both = 0.0, of_weights
        if suspect.layer.scheme.activations is not None:
            of_inputs = self.in_place.distance({name: suspect.change("activations")})
            both = self.in_place.distance({name: suspect.change("both")})
        clipped = 0.0
        if self._saturates(name, weights):
            clipped = self.in_place.distance({name: clipping(suspect)})
        kl = Divergences(both, of_weights, of_inputs, clipped)
        verdict = cause_of(kl, weights, inside)
        return LayerDiagnosis(
            name,
            str(suspect.layer.scheme),
            kl.both,
            kl.weights,
            kl.activations,
            kl.clipping,
            weights.sqnr_db,
            inside.sqnr_db,
            inside.output_sqnr_db,
            weights.saturated,
            inside.saturated,
            inside.used,
            inside.channels,
            verdict.fault,
            verdict.cause,
            verdict.detail,
        )

    def remedies(self, worst: Sequence[LayerDiagnosis]) -> list[Remedy]:
        """What helps the worst layers."""
        self.console.stage_name = "try remedies"
        rows: Mapping[str, list[Tensor]] = {layer.layer: [] for layer in worst}
        for each in inputs(self.in_place, rows):
            for name, x in each.items():
                rows[name].append(x)
        by_name = {layer.layer: layer for layer in worst}
        found: list[Remedy] = []
        for name in self.console.bar("layer")(by_name):
            if rows[name]:
                found += try_remedies(
                    self.in_place, self.suspects[name], torch.cat(rows[name]), by_name[name].kl
                )
        return found


def _notes(quantized: nn.Module, in_place: InPlace, mixed: Sequence[str]) -> list[str]:
    modules = quantized_modules(quantized).values()
    embeddings = sum(isinstance(m, QuantEmbedding) for m in modules)
    notes = []
    if embeddings:
        notes.append(f"{embeddings} quantized embeddings count in the whole model only")
    if mixed:
        notes.append(
            f"{len(mixed)} layers such as {mixed[0]} were left out: the recipe mixed the channels "
            "between them, so they cannot stand in the float model"
        )
    if in_place.chain is None:
        notes.append(f"the whole model ran for every layer: {in_place.broken}")
    return notes
