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
from ptq.algorithms.clip import better_of, by_rows, nearest_scale, range_qparams
from ptq.algorithms.rtn import nearest_codes
from ptq.config import WeightScheme
from ptq.core import QParams
from ptq.errors import UnsupportedError
from ptq.formats import IntFormat


class HqqOptions(BaseModel):
    """Of the half-quadratic solver; the defaults are its authors'."""

    model_config = ConfigDict(extra="forbid", strict=True)
    norm: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="p of the norm of the error: small for few weights far off"
    )
    beta: Annotated[float, Field(gt=0)] = Field(10.0, description="of the penalty, at first")
    growth: Annotated[float, Field(gt=1)] = Field(1.01, description="of the penalty, at each step")
    iterations: Annotated[int, Field(ge=1)] = Field(20, description="steps, at most")


def hqq(
    weight: Tensor, scheme: WeightScheme, _: InputMoments | None, options: HqqOptions
) -> Outcome:
    """Quantize a weight [N, K]; each part has, in the p-norm, at most round-to-nearest's error.

    Raises:
        UnsupportedError: the codes are no integers.
    """
    weight = weight.detach()
    if not isinstance(scheme.number_format, IntFormat):
        raise UnsupportedError(f"{scheme.format} codes are not for hqq: leave it out of the recipe")
    qparams = by_rows(weight, scheme, lambda rows: _solve(rows, scheme, options))
    return Outcome(nearest_codes(weight, scheme, qparams))


def _solve(rows: Tensor, scheme: WeightScheme, options: HqqOptions) -> QParams:
    """The best scales and zero points on the way of the solver, which starts from the ranges."""
    parts = scheme.granularity_value.split(rows.float())
    plain = range_qparams(rows, scheme)
    scale, zero = _apart(plain)
    best, least = plain, _distance(parts, plain, scheme, options)
    beta = options.beta / scale.square()
    for iteration in range(options.iterations):
        codes = _codes(parts, scale, zero, scheme)
        steps = codes if zero is None else codes - zero
        error = _shrink(parts - steps * scale, beta, options.norm)
        if zero is None or iteration % 2:
            over = steps.square().sum(-1, keepdim=True)
            fitted = ((parts - error) * steps).sum(-1, keepdim=True) / over.clamp(min=1)
            scale = torch.where(fitted != 0, fitted, scale)
        else:
            zero = (codes - (parts - error) / scale).mean(-1, keepdim=True)
        tried = _stored(scale, zero, plain, scheme)
        distance = _distance(parts, tried, scheme, options)
        better = distance < least
        least = torch.where(better, distance, least)
        best = better_of(better, tried, best)
        beta = beta * options.growth
    return best


def _apart(qparams: QParams) -> tuple[Tensor, Tensor | None]:
    """In float32, to broadcast over the elements of a part."""
    zero = qparams.zero_point
    return qparams.scale.float().unsqueeze(-1), None if zero is None else zero.float().unsqueeze(-1)


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


def _stored(scale: Tensor, zero: Tensor | None, plain: QParams, scheme: WeightScheme) -> QParams:
    """As they would be stored: scales that the scheme has, zero points whole."""
    fmt, stored = scheme.int_format, nearest_scale(scale.squeeze(-1), plain.scale, scheme)
    if zero is None:
        return QParams(stored, None)
    return QParams(stored, zero.squeeze(-1).round().clamp(fmt.qmin, fmt.qmax).to(fmt.dtype))


def _distance(parts: Tensor, qparams: QParams, scheme: WeightScheme, options: HqqOptions) -> Tensor:
    """The p-norm (to the power of p) of each part's error: [scale rows, scale columns]."""
    scale, zero = _apart(qparams)
    codes = _codes(parts, scale, zero, scheme)
    near = (codes if zero is None else codes - zero) * scale
    return (parts - near).abs_().pow_(options.norm).sum(-1)
