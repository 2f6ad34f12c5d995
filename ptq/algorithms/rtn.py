"""Round to nearest: every weight to the nearest code of its own range."""

import torch
from torch import Tensor

from ptq.config import WeightScheme
from ptq.core import QuantizedWeight, choose_qparams, pack, quantize

_AT_ONCE = 1 << 22  # weights that are held in float32 at a time


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
    pieces = [_quantize_rows(rows, scheme) for rows in torch.split(weight, step)]
    packed, scales, zero_points = zip(*pieces, strict=True)
    return QuantizedWeight(
        torch.cat(packed),
        torch.cat(scales),
        None if scheme.symmetric else torch.cat(zero_points),
        scheme.int_format,
        scheme.granularity_value,
        shape,
    )


def _quantize_rows(rows: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes, scale and zero point of some rows."""
    fmt, granularity = scheme.int_format, scheme.granularity_value
    low, high = torch.aminmax(granularity.split(rows), dim=-1)
    qparams = choose_qparams(
        low,
        high,
        fmt,
        symmetric=scheme.symmetric,
        signed_scale=scheme.signed_scale,
        scale_dtype=scheme.torch_scale_dtype,
        power_of_two=scheme.power_of_two_scale,
    )
    codes = quantize(rows, qparams.scale, qparams.zero_point, fmt, granularity)
    return pack(codes, fmt), qparams.scale, qparams.zero_point
