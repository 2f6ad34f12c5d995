"""Round to nearest: every weight to the nearest code of its own range."""

import torch
from torch import Tensor

from ptq.algorithms.base import InputMoments, Outcome
from ptq.algorithms.clip import ClipOptions, range_qparams, search_qparams
from ptq.config import WeightScheme
from ptq.core import QParams, QuantizedWeight, pack, quantize

_AT_ONCE = 1 << 22  # weights that are held in float32 at a time


class RtnOptions(ClipOptions):
    """As :class:`ClipOptions`."""


def rtn(
    weight: Tensor, scheme: WeightScheme, moments: InputMoments | None, options: RtnOptions
) -> Outcome:
    """Round to nearest, within the range or (``clip``) within the clipped range that leaves the
    least squared error of the weight, each column weighted by its input where that is known."""
    if not options.clip:
        return Outcome(round_to_nearest(weight, scheme))
    importance = None if moments is None else moments.second.diagonal()
    return Outcome(
        nearest_codes(weight, scheme, search_qparams(weight, scheme, importance, options))
    )


def round_to_nearest(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Quantize a weight [N, K] by the extremes of each part that shares a scale.

    Works through the rows in pieces, so that the float32 copies stay small.

    Raises:
        ConfigError: the group size does not divide K.
    """
    weight = weight.detach()
    shape = (weight.shape[0], weight.shape[1])
    scheme.granularity_value.scale_shape(shape)
    whole = scheme.granularity == "tensor"
    step = shape[0] if whole else max(1, _AT_ONCE // shape[1])
    pieces = [
        nearest_codes(rows, scheme, range_qparams(rows, scheme))
        for rows in torch.split(weight, step)
    ]
    return QuantizedWeight(
        torch.cat([p.packed for p in pieces]),
        torch.cat([p.scale for p in pieces]),
        None
        if scheme.symmetric
        else torch.cat([p.zero_point for p in pieces if p.zero_point is not None]),
        scheme.int_format,
        scheme.granularity_value,
        shape,
    )


def nearest_codes(weight: Tensor, scheme: WeightScheme, qparams: QParams) -> QuantizedWeight:
    """Each weight of [N, K] to the nearest code of these scales."""
    fmt, granularity = scheme.int_format, scheme.granularity_value
    codes = quantize(weight, qparams.scale, qparams.zero_point, fmt, granularity)
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedWeight(
        pack(codes, fmt), qparams.scale, qparams.zero_point, fmt, granularity, shape
    )
