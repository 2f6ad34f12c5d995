"""Rotating what a layer reads, by ptq's own op where it is there."""

import torch
from torch import Tensor

from ptq.core import Rotation
from ptq.native import ready


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """``x R`` [M, K] in the dtype of x, computed in float32.

    torch multiplies such small matrices at a tenth of what a processor can do, and needs six calls.
    """
    fits = x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    if not (x.device.type == "cpu" and fits and ready()):
        return rotation(x)
    left, right = rotation.factors(x)
    y: Tensor = torch.ops.ptq.rotate_rows(x.contiguous(), left, right)
    return y
