"""Whether codes stand for the float weight, and if not, what happened to them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ptq.algorithms import round_to_nearest
from ptq.core import QuantizedWeight
from ptq.diagnosis.ranges import weight_limits
from ptq.diagnosis.suspect import Suspect, decibels

Fault = Literal["scale", "zero_point", "weight_clipping", "codes"]

_EXCESS = 12.0
"""A part whose squared error is so many times round-to-nearest's has a fault. Algorithms that
compensate errors stay below: what GPTQ gives SmolLM2's weights has up to 4 times as much."""
_EXPLAINED = 0.25  # of the squared error may be left


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
    """

    sqnr_db: float | None
    saturated: float
    fault: Fault | None
    parts: float
    detail: str
    levels: float


@torch.no_grad()
def examine(suspect: Suspect) -> WeightFindings:
    """Compare the codes of a layer with its float weight.

    A part with much more error than rounding to nearest has is faulty, and the fault is what
    explains the error best: a factor (``scale``), a shift (``zero_point``), weights beyond the
    ends of the codes (``weight_clipping``); or else the ``codes`` are not those of this weight.
    """
    weight, target = suspect.layer.quantized_weight, suspect.target
    split = weight.granularity.split
    wanted, found = split(target), split(weight.dequantize())
    error = (found - wanted).square().sum(-1)
    limits = weight_limits(weight)
    saturated = limits.outside(wanted).float().mean().item()
    usual = split(round_to_nearest(target, suspect.layer.scheme.weights).dequantize()) - wanted
    least = usual.square().sum(-1).clamp(min=1e-12 * wanted.square().sum(-1))
    faulty = error > _EXCESS * least.clamp(min=torch.finfo(torch.float32).tiny)
    fault, detail = None, ""
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
    )


def _explain(
    wanted: Tensor, found: Tensor, clipped: Tensor, faulty: Tensor, weight: QuantizedWeight
) -> tuple[Fault, str]:
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
        return "codes", f"correlation with the float weight {_correlation(wanted, found):.2f}"
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
    used = len(torch.unique(weight.codes.to(torch.float32)))
    return min(1.0, used / 2**weight.format.bits)
