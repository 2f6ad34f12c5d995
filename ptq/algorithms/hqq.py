"""Half-quadratic quantization: zero points and scales for which few weights are far off.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"
(https://mobiusml.github.io/hqq_blog/): minimises ``|W - (Q - Z) S|_p`` with p < 1 by splitting off
the error: a shrinkage step for the error, then a closed form for the zero point. Needs no data.
Zero points are whole numbers here, so the scale has its turn as well, by its own closed form; where
there is no zero point (symmetric) it is the scale's turn always.
"""

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.algorithms.base import InputMoments, Outcome
from ptq.algorithms.clip import range_qparams
from ptq.algorithms.rtn import nearest_codes
from ptq.config import WeightScheme
from ptq.core import QParams


class HqqOptions(BaseModel):
    """Of the half-quadratic solver; the defaults are its authors'."""

    model_config = ConfigDict(extra="forbid", strict=True)
    norm: Annotated[float, Field(gt=0, le=1)] = 0.7
    beta: Annotated[float, Field(gt=0)] = 10.0
    growth: Annotated[float, Field(gt=1)] = 1.01
    iterations: Annotated[int, Field(ge=1)] = 20


def hqq(
    weight: Tensor, scheme: WeightScheme, _: InputMoments | None, options: HqqOptions
) -> Outcome:
    """Quantize a weight [N, K]; each part has, in the p-norm, at most round-to-nearest's error."""
    parts = scheme.granularity_value.split(weight.float())
    plain = range_qparams(weight, scheme)
    scale = plain.scale.float().unsqueeze(-1)
    zero = None if plain.zero_point is None else plain.zero_point.float().unsqueeze(-1)
    best, least = plain, _distance(parts, scale, zero, scheme, options)
    beta, first = options.beta, scale
    for iteration in range(options.iterations):
        codes = _codes(parts, scale, zero, scheme)
        steps = codes if zero is None else codes - zero
        error = _shrink(parts - steps * scale, beta / first.square(), options.norm)
        if zero is None or iteration % 2:
            over = steps.square().sum(-1, keepdim=True)
            fitted = ((parts - error) * steps).sum(-1, keepdim=True) / over.clamp(min=1)
            scale = torch.where((over > 0) & (fitted != 0), fitted, scale)
        else:
            zero = (codes - (parts - error) / scale).mean(-1, keepdim=True)
        tried = _stored(scale, zero, scheme)
        distance = _distance(
            parts,
            tried.scale.float().unsqueeze(-1),
            None if tried.zero_point is None else tried.zero_point.float().unsqueeze(-1),
            scheme,
            options,
        )
        better = distance < least
        least = torch.where(better, distance, least)
        best = _choose(better, tried, best)
        beta *= options.growth
    return Outcome(nearest_codes(weight, scheme, best))


def _codes(parts: Tensor, scale: Tensor, zero: Tensor | None, scheme: WeightScheme) -> Tensor:
    fmt = scheme.int_format
    codes = parts / scale
    if zero is not None:
        codes += zero
    return codes.round_().clamp_(fmt.qmin, fmt.qmax)


def _shrink(error: Tensor, beta: Tensor, norm: float) -> Tensor:
    """The generalised soft threshold of the p-norm."""
    size = error.abs()
    cut = (size - size.clamp(min=1e-12).pow(norm - 1) / beta).clamp_(min=0)
    return error.sign() * cut


def _stored(scale: Tensor, zero: Tensor | None, scheme: WeightScheme) -> QParams:
    """As they would be stored: scales in their dtype, zero points whole."""
    fmt, dtype = scheme.int_format, scheme.torch_scale_dtype
    stored = scale.squeeze(-1).to(dtype)
    least = torch.full_like(stored, torch.finfo(dtype).smallest_normal)
    stored = torch.where(stored.abs() < least, least, stored)
    if not scheme.signed_scale:
        stored = stored.abs()
    if zero is None:
        return QParams(stored, None)
    return QParams(stored, zero.squeeze(-1).round().clamp(fmt.qmin, fmt.qmax).to(fmt.dtype))


def _distance(
    parts: Tensor, scale: Tensor, zero: Tensor | None, scheme: WeightScheme, options: HqqOptions
) -> Tensor:
    codes = _codes(parts, scale, zero, scheme)
    near = (codes if zero is None else codes - zero) * scale
    return (parts - near).abs_().pow_(options.norm).sum(-1)


def _choose(better: Tensor, ours: QParams, theirs: QParams) -> QParams:
    zero_point = None
    if ours.zero_point is not None and theirs.zero_point is not None:
        zero_point = torch.where(better, ours.zero_point, theirs.zero_point)
    return QParams(torch.where(better, ours.scale, theirs.scale), zero_point)
