"""Choosing the scale of each part of a weight by the error that it leaves, not by its range."""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.config import WeightScheme
from ptq.core import QParams, choose_qparams

_AT_ONCE = 1 << 20  # weights that are held in float32 at a time; caches hold some of their copies


class ClipOptions(BaseModel):
    """Whether ranges are clipped, and how finely that is searched."""

    model_config = ConfigDict(extra="forbid", strict=True)
    clip: bool = Field(False, description="search clipped ranges")
    grid: Annotated[int, Field(ge=1, le=200)] = Field(
        20, description="clipped ranges that are tried"
    )
    smallest: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="narrowest range that is tried, as a share of the whole"
    )


def range_qparams(weight: Tensor, scheme: WeightScheme) -> QParams:
    """Scale and zero point of a weight [N, K] by the extremes of each part that shares them."""
    low, high = torch.aminmax(scheme.granularity_value.split(weight), dim=-1)
    return _qparams(low, high, scheme)


def search_qparams(
    weight: Tensor, scheme: WeightScheme, importance: Tensor | None, options: ClipOptions
) -> QParams:
    """Scale and zero point of each part with the least squared error among clipped ranges.

    The whole range is one of them, so the error is never more than round-to-nearest's. With a
    signed scale both signs are tried.

    Args:
        weight: [N, K].
        importance: [K], what the squared error of each column counts (None: all the same), such
            as the mean square of the input.

    Returns:
        shaped ``granularity.scale_shape``.
    """
    return by_rows(weight, scheme, lambda rows: _search_rows(rows, scheme, importance, options))


def by_rows(weight: Tensor, scheme: WeightScheme, choose: Callable[[Tensor], QParams]) -> QParams:
    """``choose`` on some rows at a time, unless all share one scale, so that its copies of the
    weight [N, K] stay small."""
    whole = scheme.granularity == "tensor"
    step = weight.shape[0] if whole else max(1, _AT_ONCE // weight.shape[1])
    found = [choose(rows) for rows in torch.split(weight, step)]
    zero_points = [q.zero_point for q in found if q.zero_point is not None]
    return QParams(
        torch.cat([q.scale for q in found]), None if scheme.symmetric else torch.cat(zero_points)
    )


def nearest_scale(wanted: Tensor, old: Tensor, scheme: WeightScheme) -> Tensor:
    """The scale next to the wanted one that the scheme can store, in its dtype; the old one where
    there is none: it would not be finite, or zero, or of a sign that the scheme does not have."""
    dtype = scheme.torch_scale_dtype
    if scheme.power_of_two_scale:
        wanted = torch.exp2(torch.log2(wanted.abs()).round()) * wanted.sign()
    stored = wanted.to(dtype)
    # As in choose_qparams: kernels may flush a subnormal float32 or bfloat16 to zero.
    least = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
    size = stored.abs() if scheme.signed_scale else stored
    usable = stored.isfinite() & (size.float() >= least)
    return torch.where(usable, stored, old.to(dtype))


def _search_rows(
    rows: Tensor, scheme: WeightScheme, importance: Tensor | None, options: ClipOptions
) -> QParams:
    parts = scheme.granularity_value.split(rows.float())
    factor = None
    if importance is not None:
        factor = scheme.granularity_value.split(importance.float().expand_as(rows))
    low, high = torch.aminmax(parts, dim=-1)
    best = _qparams(low, high, scheme)
    least = _error(parts, best, scheme, factor)
    shrinks = torch.linspace(1, options.smallest, options.grid + 1).tolist() if options.clip else []
    for shrink in shrinks:
        for tried in _tried(low * shrink, high * shrink, scheme):
            error = _error(parts, tried, scheme, factor)
            better = error < least
            least = torch.where(better, error, least)
            best = better_of(better, tried, best)
    return best


def _tried(low: Tensor, high: Tensor, scheme: WeightScheme) -> list[QParams]:
    if not scheme.signed_scale:
        return [_qparams(low, high, scheme)]
    # The sign follows the larger end: widen either one a little to have both.
    most = torch.maximum(high, -low)
    return [_qparams(-most, high, scheme), _qparams(low, most * (1 + 1e-6), scheme)]


def _qparams(low: Tensor, high: Tensor, scheme: WeightScheme) -> QParams:
    return choose_qparams(
        low,
        high,
        scheme.number_format,
        symmetric=scheme.symmetric,
        signed_scale=scheme.signed_scale,
        scale_dtype=scheme.torch_scale_dtype,
        power_of_two=scheme.power_of_two_scale,
    )


def _error(parts: Tensor, qparams: QParams, scheme: WeightScheme, factor: Tensor | None) -> Tensor:
    """Squared error of each part: [scale rows, scale columns]."""
    fmt, scale = scheme.number_format, qparams.scale.float().unsqueeze(-1)
    steps = parts / scale
    if qparams.zero_point is None:
        steps = fmt.nearest(steps)
    else:
        zero_point = qparams.zero_point.float().unsqueeze(-1)
        steps = fmt.nearest(steps.round_().add_(zero_point)).sub_(zero_point)
    error = steps.mul_(scale).sub_(parts).square_()
    return (error if factor is None else error.mul_(factor)).sum(-1)


def better_of(better: Tensor, ours: QParams, theirs: QParams) -> QParams:
    """Part by part: ours where it is better."""
    zero_point = None
    if ours.zero_point is not None and theirs.zero_point is not None:
        zero_point = torch.where(better, ours.zero_point, theirs.zero_point)
    return QParams(torch.where(better, ours.scale, theirs.scale), zero_point)
