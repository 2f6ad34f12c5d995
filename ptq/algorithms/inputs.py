"""The static scale of a layer's input, from the range that calibration saw."""

from dataclasses import replace

import torch
from torch import Tensor

from ptq.config import ActivationScheme
from ptq.core import QuantizedWeight, choose_qparams
from ptq.formats import FORMATS


def with_static_input(
    weight: QuantizedWeight, scheme: ActivationScheme, low: Tensor, high: Tensor
) -> QuantizedWeight:
    """The weight with the scale (and zero point) of an input that ranges from low to high.

    Args:
        low, high: one element each, as an observer's ``range()`` gives per tensor.
    """
    qparams = choose_qparams(
        low.reshape(()), high.reshape(()), FORMATS[scheme.format], symmetric=scheme.symmetric
    )
    zero_point = qparams.zero_point
    return replace(
        weight,
        input_scale=qparams.scale,
        input_zero_point=None if zero_point is None else zero_point.to(torch.int32),
    )
