"""The exact sensitivity of layers: each is quantized alone, in place, and the model is run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ptq.algorithms import round_to_nearest, with_static_input
from ptq.calibrate import LayerStatistics, TokenSet
from ptq.config import Scheme, WeightScheme
from ptq.core import QuantizedWeight
from ptq.errors import CalibrationError, ConfigError, PTQError
from ptq.model import unfolded
from ptq.sensitivity.change import InputSpace, Part, change_of
from ptq.sensitivity.distance import Measure
from ptq.sensitivity.in_place import InPlace

Quantize = Callable[[Tensor, WeightScheme], QuantizedWeight]
Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class LayerDivergence:
    """What one layer does to the model's predictions when it alone is quantized.

    Args:
        part: what of it: its weights, its activations, or both.
        kl: mean over the scored tokens, nats; another distance if ``measure`` says so.
        measure: as :class:`~ptq.sensitivity.distance.Distances` says.
    """

    layer: str
    scheme: Scheme
    part: Part
    kl: float
    measure: Measure


def exact_divergence(
    model: nn.Module,
    data: TokenSet | Iterable[Any],
    candidates: Mapping[str, Scheme | Iterable[Scheme]],
    *,
    parts: Iterable[Part] | None = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    quantize: Quantize = round_to_nearest,
    progress: Progress = iter,
) -> list[LayerDivergence]:
    """The divergence from the float model's predictions when one layer alone is quantized.

    The codes are those of ``quantize``; products are computed in float. Only the blocks from the
    layer's own on run, so a layer of the middle costs half a forward pass a scheme and part. The
    model is left as it was, bit for bit, also after an exception or Ctrl-C.

    Args:
        model: float. In float16 or bfloat16 the dequantized weights are rounded to that.
        data: token windows (:func:`ptq.calibrate.evaluation_windows`), or batches as calibration
            takes them.
        candidates: by name of the layer (as a plan has them), a scheme or several.
        parts: those to measure (default: of a weight-only scheme the weights, of others weights,
            activations and both). A weight-only scheme has no activations to measure, and its
            ``both`` is its weights.
        statistics: the ranges of static activations (:func:`ptq.calibrate.collect`).
        progress: wraps the layers' names.

    Returns:
        One for each layer, scheme and part, in the order given.

    Raises:
        ConfigError: there is no such linear layer, or a scheme does not fit it.
        CalibrationError: the data cannot be used, or a static scheme has no statistics.
        ModelError: outputs that are not finite.
    """
    asked = {
        name: (given,) if isinstance(given, Scheme) else tuple(given)
        for name, given in candidates.items()
    }
    found: list[LayerDivergence] = []
    parts = None if parts is None else tuple(parts)
    with unfolded(model, asked):
        for name, schemes in asked.items():
            _check(model, name, schemes, statistics or {})
        in_place = InPlace(model, data)
        for name in progress(asked):
            weight = _linear(model, name).weight.detach()
            for scheme in asked[name]:
                quantized = codes_of(name, weight, scheme, (statistics or {}).get(name), quantize)
                for part in _parts(scheme, parts):
                    change = change_of(quantized, scheme, weight, part)
                    distance = in_place.distance({name: change})
                    found.append(LayerDivergence(name, scheme, part, distance, in_place.measure))
    return found


def _parts(scheme: Scheme, asked: tuple[Part, ...] | None) -> tuple[Part, ...]:
    if scheme.activations is None:
        return ("weights",) if asked is None else tuple(p for p in asked if p != "activations")
    return ("weights", "activations", "both") if asked is None else tuple(asked)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _check(
    model: nn.Module,
    name: str,
    schemes: Iterable[Scheme],
    statistics: Mapping[str, LayerStatistics],
) -> None:
    """Refuse what cannot be measured on the layer, before anything is run."""
    try:
        layer: nn.Module | None = model.get_submodule(name)
    except AttributeError:
        layer = None
    if type(layer) is not nn.Linear:
        found = "there is none" if layer is None else f"it is a {type(layer).__name__}"
        raise ConfigError(f"layer {name}: expected a linear layer of the float model, {found}")
    for scheme in schemes:
        try:
            scheme.weights.granularity_value.scale_shape((layer.out_features, layer.in_features))
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from None
        if _is_static(scheme) and name not in statistics:
            raise _no_range(name, scheme)


def _no_range(name: str, scheme: Scheme) -> CalibrationError:
    return CalibrationError(
        f"layer {name}: scheme {scheme} has static activations, whose range is not given: "
        "pass statistics=ptq.calibrate.collect(...)"
    )


def _is_static(scheme: Scheme) -> bool:
    return scheme.activations is not None and scheme.activations.mode == "static"


def codes_of(
    name: str,
    weight: Tensor,
    scheme: Scheme,
    seen: LayerStatistics | None,
    quantize: Quantize,
) -> QuantizedWeight:
    """Codes of the weight [N, K], rotated where the scheme rotates, and the static input scale.

    Args:
        name: of the layer, for the errors.
        seen: what static activations range over.

    Raises:
        PTQError: as ``quantize`` does.
        CalibrationError: a static scheme without ``seen``.
    """
    space = InputSpace.of(scheme, weight.shape[1])
    try:
        made = quantize(weight if space.plain else space.weight(weight), scheme.weights)
    except PTQError as error:
        raise type(error)(f"layer {name}: {error}") from None
    if not _is_static(scheme):
        return made
    assert scheme.activations is not None
    if seen is None:
        raise _no_range(name, scheme)
    return with_static_input(made, scheme.activations, seen.low, seen.high)
