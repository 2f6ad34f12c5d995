"""What could be done about a layer, each tried in place: its gain is measured, not guessed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.algorithms import ALGORITHMS, InputMoments, with_static_input
from ptq.config import Plugin, Scheme
from ptq.core import QuantizedWeight, Rotation
from ptq.diagnosis.suspect import Suspect
from ptq.formats import IntFormat
from ptq.modules import QuantLinear
from ptq.observers import SecondMoment, make_observer
from ptq.sensitivity import InPlace, InputSpace

_STRENGTHS = (0.25, 0.5, 0.75)  # of smoothing


@dataclass(frozen=True)
class Remedy:
    """One thing to do about one layer.

    Args:
        remedy: what, in words.
        scheme: that the layer has then; ``float``.
        kl_before, kl_after: the layer's own divergence, alone and in place.
        bytes: that it costs in the checkpoint; negative where it saves some.
    """

    layer: str
    remedy: str
    scheme: str
    kl_before: float
    kl_after: float
    bytes: int

    @property
    def gain(self) -> float:
        """By how much the divergence falls."""
        return self.kl_before - self.kl_after


@dataclass(frozen=True, eq=False)
class Attempt:
    """A remedy that can be tried.

    Args:
        algorithm: and its options, as in a recipe.
        scale: float32 [K] that the input's channels are divided by, or None.
        observer: of a static range.
    """

    remedy: str
    scheme: Scheme
    algorithm: str = "rtn"
    options: tuple[tuple[str, Any], ...] = ()
    scale: Tensor | None = None
    observer: str = "minmax"

    def carried_out(self, suspect: Suspect, rows: Tensor) -> Suspect:
        """The layer as it would be.

        Args:
            rows: float [R, K] of the float model's input.
        """
        scale = _product(suspect.columns, self.scale)
        space = InputSpace.of(self.scheme, suspect.own.shape[1], scale)
        inside = space.enter(rows.float())
        target = space.weight(suspect.own)
        if suspect.rows is not None:
            target = target / suspect.rows[:, None]
        weight = self._codes(target, inside)
        activations = self.scheme.activations
        if activations is not None and activations.mode == "static":
            observer = make_observer(Plugin(name=self.observer), activations)
            observer.update(inside)
            weight = with_static_input(weight, activations, *observer.range())
        layer = QuantLinear(weight, self.scheme, suspect.layer.bias)
        return Suspect(suspect.name, suspect.own, layer, scale, suspect.rows)

    def _codes(self, target: Tensor, inside: Tensor) -> QuantizedWeight:
        algorithm = ALGORITHMS[self.algorithm]
        moments = None
        if algorithm.needs_moments:
            sums = SecondMoment(inside.shape[1])
            sums.update(inside)
            seen = sums.finish()
            moments = InputMoments(seen.second, None, seen.rows)
        options = algorithm.options(**dict(self.options))
        return algorithm.quantize(target, self.scheme.weights, moments, options).weight


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


@torch.no_grad()
def try_remedies(in_place: InPlace, suspect: Suspect, rows: Tensor, kl: float) -> list[Remedy]:
    """Every remedy that applies to the layer, the one with the largest gain first.

    Of smoothing, the best of several strengths. Ranges and compensated errors are those of the rows
    that the divergence is measured on as well, which flatters them a little.

    Args:
        rows: the layer's input in the float model, [R, K].
        kl: the layer's divergence as it is.
    """
    now = suspect.layer.quantized_weight.nbytes
    best: dict[str, Remedy] = {}
    for attempt in attempts(suspect, rows):
        made = attempt.carried_out(suspect, rows)
        after = in_place.distance({suspect.name: made.change("both")})
        cost = made.layer.quantized_weight.nbytes - now
        found = Remedy(suspect.name, attempt.remedy, str(attempt.scheme), kl, after, cost)
        known = best.get(attempt.remedy)
        best[attempt.remedy] = found if known is None or after < known.kl_after else known
    size = suspect.own.nbytes - now
    kept = Remedy(suspect.name, "keep it in float", "float", kl, 0.0, size)
    return sorted([*best.values(), kept], key=lambda r: (r.kl_after, r.bytes))


def attempts(suspect: Suspect, rows: Tensor) -> Iterator[Attempt]:
    """What applies to a layer of this scheme; its groups become neighbours."""
    scheme = suspect.layer.scheme.model_copy(update={"input_order": False})
    weights, activations = scheme.weights, scheme.activations
    fmt = weights.number_format
    yield Attempt("quantize it anew", scheme)
    if isinstance(fmt, IntFormat):
        yield from _of_weights(scheme, suspect.own.shape[1])
        yield Attempt("recipe: gptq", scheme, "gptq")
    if activations is not None:
        if activations.mode == "static":
            yield Attempt("static range by least squared error", scheme, observer="mse")
            yield Attempt("dynamic activations", _with(scheme, activations={"mode": "dynamic"}))
        for strength in _STRENGTHS:
            scale = _smoothing(suspect.own, rows, strength)
            yield Attempt("recipe: smoothquant", scheme, scale=scale)
        if isinstance(fmt, IntFormat):
            yield Attempt("activations in float", _with(scheme, activations=None))
    if scheme.input_rotation is None and Rotation.of(suspect.own.shape[1]).order > 1:
        rotated = scheme.model_copy(update={"input_rotation": "hadamard"})
        yield Attempt("recipe: rotation", rotated)


def _of_weights(scheme: Scheme, columns: int) -> Iterator[Attempt]:
    weights = scheme.weights
    few = weights.number_format.bits < 8
    finer = _finer_group(weights.group_size, columns)
    if finer is not None:
        yield Attempt(f"groups of {finer}", _with(scheme, group_size=finer))
    if weights.symmetric and few:
        yield Attempt("asymmetric weights", _with(scheme, symmetric=False))
        if finer is not None:
            both = _with(scheme, symmetric=False, group_size=finer)
            yield Attempt(f"asymmetric weights, groups of {finer}", both)
    if few:
        yield Attempt("recipe: rtn with clip search", scheme, "rtn", (("clip", True),))
        eight = _with(scheme, format="int8", symmetric=True, group_size=None)
        yield Attempt("int8 weights", eight)


def _finer_group(group_size: int | None, columns: int) -> int | None:
    sizes = (128, 64, 32) if group_size is None else (group_size // 2,)
    return next((g for g in sizes if g >= 16 and g < columns and columns % g == 0), None)


def _with(scheme: Scheme, **changes: Any) -> Scheme:
    """The scheme with keys of its weights, or its activations, changed; what depends on them has
    its default again."""
    made = scheme.model_dump()
    weights = made["weights"]
    if "activations" in changes:
        made["activations"] = changes.pop("activations")
    if changes:
        weights |= changes
        for key in ("scale_dtype", "signed_scale"):
            del weights[key]
        weights["granularity"] = "channel" if weights["group_size"] is None else "group"
    return Scheme.model_validate(made)


def _smoothing(weight: Tensor, rows: Tensor, strength: float) -> Tensor:
    """SmoothQuant's scale (Xiao et al. 2023, arXiv 2211.10438, equation 4), float32 [K]."""
    largest, own = rows.abs().amax(0).float(), weight.abs().amax(0).float()
    scale = largest.pow(strength) / own.pow(1 - strength)
    return torch.where((largest > 0) & (own > 0), scale, torch.ones_like(scale))
