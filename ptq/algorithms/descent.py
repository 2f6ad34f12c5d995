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
        self._slope = hessian @ (codes.values() - target.T)

    def move_codes(self) -> None:
        """One pass over the columns, each code to its best value given the others."""
        columns = self._hessian.shape[0]
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            moves = self._move_block(start, end)
            self._slope[:start].addmm_(self._hessian[:start, start:end], moves)
            self._slope[end:].addmm_(self._hessian[end:, start:end], moves)

    def _move_block(self, start: int, end: int) -> Tensor:
        """The changes of the block's values: [end - start, N]."""
        fmt, codes, slope = self._scheme.int_format, self._codes, self._slope[start:end]
        within = self._hessian[start:end, start:end].contiguous()
        moves = torch.empty_like(slope)
        for i, pivot in enumerate(within.diagonal().tolist()):
            steps = codes.steps[start + i]
            group = (start + i) // codes.group_size
            scale, zero_point = codes.scale[group], codes.zero_point[group]
            best = torch.addcdiv(steps, slope[i], scale, value=-1 / pivot).round_()
            best.add_(zero_point).clamp_(fmt.qmin, fmt.qmax).sub_(zero_point)
            move = torch.sub(best, steps, out=moves[i]).mul_(scale)
            slope.addr_(within[i], move)
            steps.copy_(best)
        return moves

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
            self._slope.addmm_(self._hessian[:, part], steps * change)
