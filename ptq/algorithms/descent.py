"""Descent on the quadratic form after the rounding: on the codes, and on the scales.

Codes: cyclic coordinate descent with the scales fixed, as in Behdin et al. 2023, "QuantEase"
(arXiv 2309.01885). A code's best value, given all the others of its row, is the nearest one to
``q - (E H)_k / H_kk``. Unlike GPTQ, which rounds a column once, it sees the columns after it too.

Scales: with the codes fixed the form is quadratic in each scale as well; its minimum, in the
dtype of the scale, replaces it where that is less. Neither can make the form more.
"""

import torch
from torch import Tensor

from ptq.algorithms.clip import nearest_scale
from ptq.algorithms.compensate import Codes
from ptq.config import WeightScheme
from ptq.core import product

_BLOCK = 128  # columns between two updates of the slope of the rest


class Descent:
    """Holds ``slope``, half the gradient ``H (Q - T)^T`` [K, N], current with the codes.

    Args:
        codes: changed in place.
        target: T, float32 [N, K].
        hessian: float32 [K, K], positive definite.
    """

    def __init__(self, codes: Codes, target: Tensor, hessian: Tensor, scheme: WeightScheme) -> None:
        self._codes, self._hessian, self._scheme = codes, hessian, scheme
        self._slope = product(hessian, codes.values().T - target)

    def move_codes(self) -> None:
        """One pass over the columns, each code to its best value given the others."""
        columns, size = self._hessian.shape[0], self._codes.group_size
        for group in range(columns // size):
            last = (group + 1) * size
            for start in range(group * size, last, _BLOCK):
                end = min(start + _BLOCK, last)
                moves = self._move_block(group, start, end).T.contiguous()
                self._slope[:start] += product(self._hessian[:start, start:end], moves)
                self._slope[end:] += product(self._hessian[end:, start:end], moves)

    def _move_block(self, group: int, start: int, end: int) -> Tensor:
        """The changes of the values of some columns of a group: [end - start, N]."""
        fmt, codes = self._scheme.int_format, self._codes
        scale, zero_point = codes.scale[group], codes.zero_point[group]
        low, high = fmt.qmin - zero_point, fmt.qmax - zero_point
        within = self._hessian[start:end, start:end].contiguous()
        old, slope = codes.steps[start:end], self._slope[start:end]
        slope /= scale  # as the codes, in units of the scale
        best, moves = torch.empty_like(old), torch.empty_like(old)
        pivots = within.diagonal().tolist()
        for pivot, row, before, towards, after, move in zip(
            pivots, within, old, slope, best, moves, strict=True
        ):
            torch.sub(before, towards, alpha=1 / pivot, out=after).round_().clamp_(low, high)
            slope.addr_(row, torch.sub(after, before, out=move))
        old.copy_(best)
        slope *= scale
        return moves.mul_(scale)

    def tune_scales(self) -> None:
        """One pass over the groups, each scale to its best value given the others."""
        size = self._codes.group_size
        for group, scale in enumerate(self._codes.scale):
            part = slice(group * size, (group + 1) * size)
            steps = self._codes.steps[part]
            curve = (self._hessian[part, part] @ steps).mul_(steps).sum(0)
            slope = (self._slope[part] * steps).sum(0)
            if self._scheme.granularity == "tensor":
                curve, slope = curve.sum().expand_as(curve), slope.sum().expand_as(slope)
            tuned = nearest_scale(scale - slope / curve, scale, self._scheme).float()
            change = tuned - scale
            change *= change * (change * curve + 2 * slope) < 0
            scale += change
            self._slope += product(self._hessian[:, part], (steps * change).T)
