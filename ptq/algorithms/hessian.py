"""The quadratic form by which error-compensating algorithms judge a rounding, and its factor.

A layer that holds Q instead of W, on its input x, where the float model has W (x + d):

    E|Q x - W (x + d)|^2  =  tr(E H E^T) - 2 tr(E B^T) + const,  E = Q - W,  B = W C

with ``H = E[x x^T]`` and ``C = E[d x^T]``. Without feedback B is zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight, product

_LADDER = (1, 10, 100, 1000)  # factors on the damping, tried in turn


@dataclass(frozen=True, eq=False)
class Factor:
    """A damped H and the upper Cholesky factor of its inverse.

    Args:
        hessian: float32 [K, K], damped, columns as they are in the weight.
        upper: float32 [K, K], columns in the order in which they are rounded.
        notes: what was needed for it.
    """

    hessian: Tensor
    upper: Tensor
    notes: tuple[str, ...]


def falling(second: Tensor) -> Tensor:
    """int64 [K]: the columns, those with large inputs first."""
    return torch.argsort(second.diagonal(), descending=True, stable=True)


def grouped(second: Tensor, size: int) -> Tensor:
    """int64 [K]: the columns by groups of so many, those with the largest inputs in the first; in
    a group they are in the order of the inputs, which is what ``g_idx`` of a file can say."""
    return falling(second).view(-1, size).sort(1).values.flatten()


def factorize(second: Tensor, order: Tensor | None, damping: float) -> Factor | None:
    """Damp H by a share of its mean diagonal, more of it until it has a Cholesky factor.

    Channels that are always zero are left out of that mean. The damping makes them harmless: they
    are rounded to nearest. (A one in their place, as in the paper, would drown small inputs.)

    Args:
        order: int64 [K], in which the columns are rounded; None: as they are.

    Returns:
        None where the largest damping is not enough.
    """
    live = second.diagonal() > 0
    mean = float(second.diagonal()[live].mean()) if bool(live.any()) else 1.0
    for step in _LADDER:
        damped = second.clone()
        damped.diagonal().add_(damping * step * mean)
        upper = _inverse_factor(in_order(damped, order))
        if upper is None:
            upper = _inverse_factor(in_order(damped, order).double())
        if upper is not None:
            raised = f"damping raised from {damping:g} to {damping * step:g}"
            return Factor(damped, upper.float(), () if step == 1 else (raised,))
    return None


def in_order(matrix: Tensor, order: Tensor | None) -> Tensor:
    """Rows and columns of [K, K] in this order; None: the matrix itself."""
    return matrix if order is None else matrix[order[:, None], order]


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """U with ``U^T U`` the inverse of the matrix; None where rounding has left it indefinite.

    No more than two matrices are held at a time, and what the caller keeps.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    del matrix
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if int(failed) or not bool(upper.isfinite().all()) else upper


def output_error(
    weight: Tensor, made: QuantizedWeight, second: Tensor, pull: Tensor | None
) -> float:
    """``tr(E H E^T) - 2 tr(E B^T)``: less is better; with ``pull`` (B) it may be negative.

    Returns:
        infinity where it is more than float32 can hold.
    """
    error = made.dequantize() - weight
    slope = product(error, second)  # which is symmetric
    if pull is not None:
        slope -= 2 * pull
    value = float(slope.mul_(error).sum(dtype=torch.float64))
    return value if math.isfinite(value) else math.inf
