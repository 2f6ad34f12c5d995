"""The main cause of the damage that a layer does, from what was measured of it."""

from dataclasses import dataclass
from typing import Literal

from ptq.diagnosis.inputs import InputFindings
from ptq.diagnosis.weights import WeightFindings

Cause = Literal[
    "scale",
    "zero_point",
    "codes",
    "weight_clipping",
    "weight_rounding",
    "input_clipping",
    "input_range",
    "outlier_channels",
    "input_rounding",
    "none",
]

_MOST = 0.5  # of a divergence, so that a part of it is the cause
_UNUSED = 0.25  # a static range of which no more is used is too wide
_FEW = 0.5  # of the codes
_FAULTY = 0.1  # of the other part's divergence, from which a fault is the cause
_SATURATED = 0.05  # of the inputs: clipping observers leave some permille
_WIDE = 0.125  # of a static range: no more is used


@dataclass(frozen=True)
class Divergences:
    """What one layer alone does to the model's predictions.

    Args:
        both: its weights and its activations together.
        clipping: what saturates alone: weights beyond their codes, inputs beyond a static range.
    """

    both: float
    weights: float
    activations: float
    clipping: float


@dataclass(frozen=True)
class Verdict:
    """The cause, what was found in words, and whether it is a fault: codes that are not those of
    the weight, or a static range that no calibration on such inputs gives."""

    cause: Cause
    detail: str
    fault: bool = False


def cause_of(kl: Divergences, weights: WeightFindings, inputs: InputFindings) -> Verdict:
    """Faults come first; then whichever of weights and activations does more damage; and of that,
    saturation where it alone does most of it."""
    if kl.both <= 0:
        return Verdict("none", "")
    if weights.fault is not None and kl.weights >= _FAULTY * kl.activations:
        return Verdict(weights.fault, _fault(weights), True)
    if kl.activations >= _FAULTY * kl.weights:
        if inputs.saturated > _SATURATED:
            return Verdict("input_clipping", _clipped(inputs), True)
        if inputs.used is not None and inputs.used < _WIDE:
            return Verdict("input_range", _unused(inputs.used), True)
    if kl.activations > kl.weights:
        return _of_activations(kl, inputs)
    if kl.clipping >= _MOST * kl.weights and weights.saturated > 0:
        detail = f"{weights.saturated:.2%} of the weights are beyond the codes"
        return Verdict("weight_clipping", detail)
    detail = "" if weights.sqnr_db is None else f"weights {weights.sqnr_db:.1f} dB"
    if weights.levels < _FEW:
        detail += f", {weights.levels:.0%} of the codes are used"
    return Verdict("weight_rounding", detail)


_WORDS = {
    "scale": "the stored weights are",
    "zero_point": "the zero points are",
    "codes": "the codes are not those of this weight:",
    "weight_clipping": "the range of the weights is too small:",
}


def _fault(weights: WeightFindings) -> str:
    assert weights.fault is not None
    return f"{_WORDS[weights.fault]} {weights.detail}, in {weights.parts:.1%} of the scales' parts"


def _of_activations(kl: Divergences, inputs: InputFindings) -> Verdict:
    if inputs.saturated > 0 and kl.clipping >= _MOST * kl.activations:
        return Verdict("input_clipping", _clipped(inputs))
    if inputs.used is not None and inputs.used < _UNUSED:
        return Verdict("input_range", _unused(inputs.used))
    if inputs.channels:
        first = inputs.channels[0]
        detail = (
            f"channel {first.index} reaches {first.magnitude:.3g}, {first.ratio:.0f} times the "
            "median channel"
        )
        return Verdict("outlier_channels", detail)
    return Verdict("input_rounding", f"inputs {inputs.sqnr_db:.1f} dB" if inputs.sqnr_db else "")


def _clipped(inputs: InputFindings) -> str:
    used = "" if inputs.used is None else f", which go up to {inputs.used:.3g} times its end"
    return f"{inputs.saturated:.2%} of the inputs saturate{used}"


def _unused(used: float) -> str:
    return f"the inputs use {used:.1%} of the static range"
