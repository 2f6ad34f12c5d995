"""Whether codes stand for the float weight, and if not, what happened to them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ptq.algorithms import round_to_nearest
from ptq.core import QuantizedWeight
from ptq.diagnosis.ranges import weight_limits
from ptq.diagnosis.suspect import Suspect, decibels
from ptq.formats import FloatFormat

Fault = Literal["scale", "zero_point", "weight_clipping", "codes"]

_EXCESS = 10.0
"""A part whose squared error is so many times round-to-nearest's may have a fault; GPTQ and its
kin, which compensate errors, go beyond that as well."""
_OUTPUT_EXCESS = 4.0
"""A fault makes the squared error of the output as many times larger, too."""
_EXPLAINED = 0.25  # of the squared error may be left by what explains it
_UNRELATED = 0.3  # a correlation, below which codes have nothing to do with the weight


@dataclass(frozen=True)
class WeightFindings:
    """What the codes of one layer look like beside its float weight.

    Args:
        sqnr_db: the weight's signal-to-quantization-noise ratio; None where the codes are exact.
        saturated: share of the weights beyond the ends of their codes.
        fault: what is wrong with the codes, beyond rounding; None where nothing is.
        parts: share of the parts (channels or groups) that have it.
        detail: in words: how far off.
        levels: share of the format's codes that are used.
        strange: there is more error than rounding has, explained or not.
    """

    sqnr_db: float | None
    saturated: float
    fault: Fault | None
    parts: float
    detail: str
    levels: float
    strange: bool


@torch.no_grad()
def examine(suspect: Suspect, excess: Tensor) -> WeightFindings:
    """Compare the codes of a layer with its float weight.

    A part with much more error than rounding to nearest has, in an output channel with much more
    error, is faulty where something explains the error: a factor (``scale``), a shift
    (``zero_point``), weights beyond the ends of the codes (``weight_clipping``); or where the
    ``codes`` have nothing to do with this weight. What is left is taken for an algorithm's doing.

    Args:
        excess: [N], the squared error of each output channel, by the weights alone, relative to
            round-to-nearest's.
    """
    weight, target = suspect.layer.quantized_weight, suspect.target
    scheme = suspect.layer.scheme.weights
    split = weight.granularity.split
    wanted, found = split(target), split(weight.dequantize())
    error = (found - wanted).square().sum(-1)
    limits = weight_limits(weight)
    saturated = limits.outside(wanted).float().mean().item()
    faulty = error > _EXCESS * _usual_error(wanted, round_to_nearest(target, scheme))
    outside = (excess > _OUTPUT_EXCESS)[:, None]
    faulty &= outside if faulty.shape[0] == outside.shape[0] else outside.any()
    fault: Fault | None = None
    detail = ""
    if bool(faulty.any()):
        fault, detail = _explain(wanted, found, limits.clipped(wanted), faulty, weight)
    signal = wanted.square().sum().item()
    return WeightFindings(
        decibels(signal, error.sum().item()),
        saturated,
        fault,
        faulty.float().mean().item(),
        detail,
        _levels(weight),
        bool(faulty.any()),
    )


def _usual_error(wanted: Tensor, nearest: QuantizedWeight) -> Tensor:
    """The squared error of each part that rounding to nearest has, or would be expected to have
    where that is more: a part of few weights may happen to have next to none."""
    found = nearest.granularity.split(nearest.dequantize())
    error = (found - wanted).square().sum(-1)
    if isinstance(nearest.format, FloatFormat):
        return error
    expected = nearest.scale.float().square() * wanted.shape[-1] / 12
    return torch.maximum(error, expected)


def _explain(
    wanted: Tensor, found: Tensor, clipped: Tensor, faulty: Tensor, weight: QuantizedWeight
) -> tuple[Fault | None, str]:
    """The fault of the faulty parts, and how far off they are."""
    wanted, found, clipped = wanted[faulty], found[faulty], clipped[faulty]
    step = weight.scale.float().abs().expand(faulty.shape)[faulty]
    gain = (found * wanted).sum(-1) / wanted.square().sum(-1).clamp(min=1e-30)
    shift = (found - wanted).mean(-1)
    left: dict[Fault, float] = {
        "scale": _squares(found - wanted * gain[:, None]),
        "zero_point": _squares(found - wanted - shift[:, None]),
        "weight_clipping": _squares(found - clipped),
    }
    fault = min(left, key=lambda name: left[name])
    if left[fault] > _EXPLAINED * _squares(found - wanted):
        related = _correlation(wanted, found)
        if related > _UNRELATED:
            return None, ""
        return "codes", f"correlation with the float weight {related:.2f}"
    if fault == "scale":
        return fault, f"{gain.median().item():.2f} times the float weight"
    if fault == "zero_point":
        return fault, f"off by {(shift / step).median().item():+.1f} steps"
    return fault, f"{(clipped != wanted).float().mean().item():.1%} of them beyond the codes"


def _squares(x: Tensor) -> float:
    return float(x.square().sum())


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def _levels(weight: QuantizedWeight) -> float:
    used: int = torch.unique(weight.codes.to(torch.float32)).numel()
    return min(1.0, used / float(1 << weight.format.bits))
