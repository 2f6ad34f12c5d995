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
    notes: tuple[str, ...] = ()
    if importance is not None and not bool(importance.isfinite().all()):
        importance, notes = None, ("its second moment has NaN or Inf: all columns count the same",)
    qparams = search_qparams(weight, scheme, importance, options)
    return Outcome(nearest_codes(weight, scheme, qparams), notes)


def round_to_nearest(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Quantize a weight [N, K] by the extremes of each part that shares a scale.

    Raises:
        ConfigError: the group size does not divide K.
    """
    weight = weight.detach()
    return nearest_codes(weight, scheme, range_qparams(weight, scheme))


def nearest_codes(weight: Tensor, scheme: WeightScheme, qparams: QParams) -> QuantizedWeight:
    """Each weight of [N, K] to the nearest code of these scales.

    Works through the rows in pieces, so that the float32 copies stay small.
    """
    fmt, granularity = scheme.number_format, scheme.granularity_value
    shape = (weight.shape[0], weight.shape[1])
    step = max(1, _AT_ONCE // shape[1])
    packed = []
    for start in range(0, max(1, shape[0]), step):
        rows = slice(None) if scheme.granularity == "tensor" else slice(start, start + step)
        scale = qparams.scale[rows]
        zero_point = None if qparams.zero_point is None else qparams.zero_point[rows]
        codes = quantize(weight[start : start + step], scale, zero_point, fmt, granularity)
        packed.append(pack(codes, fmt))
    return QuantizedWeight(
        torch.cat(packed), qparams.scale, qparams.zero_point, fmt, granularity, shape
    )
