"""GPTQ: each column's rounding error is made up for by the columns that are still to be rounded.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv 2210.17323), algorithm 1. With ``feedback`` the error that the layers before
have left in the input is made up for as well, as in Li et al. 2025, "GPTAQ" (arXiv 2504.02692): the
layer should give on its own input x what the float layer gives on the float input x + d,

    min |Q x - W (x + d)|^2  =  min tr (Q - W') H (Q - W')^T + const,  W' = W + W C H^-1

with ``H = E[x x^T]`` and ``C = E[d x^T]``, so it is GPTQ on W'.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ptq.algorithms.base import InputMoments, Outcome
from ptq.algorithms.clip import ClipOptions, search_qparams
from ptq.algorithms.rtn import nearest_codes, round_to_nearest
from ptq.config import WeightScheme
from ptq.core import QParams, QuantizedWeight
from ptq.errors import UnsupportedError

_LADDER = (1.0, 10.0, 100.0, 1000.0)  # factors on the damping, tried in turn


class GptqOptions(ClipOptions):
    """GPTQ's own options, and those of the search for its scales."""

    clip: bool = True
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01  # of the mean of H's diagonal
    act_order: bool = True  # columns with large inputs first; scales from the first weights
    block: Annotated[int, Field(ge=1)] = 128  # columns between two updates of the rest
    feedback: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the upstream error made up for


class GptaqOptions(GptqOptions):
    """GPTQ with all of the upstream error made up for."""

    feedback: Annotated[float, Field(ge=0, le=1)] = 1.0


def gptq(
    weight: Tensor, scheme: WeightScheme, moments: InputMoments | None, options: GptqOptions
) -> Outcome:
    """Quantize a weight [N, K] so that its output on the calibration inputs changes least.

    Never worse on them than round to nearest, which takes its place, with a note, where the
    moments cannot be used.
    """
    plain = round_to_nearest(weight, scheme)
    if moments is None:
        return Outcome(plain, ("no calibration row reaches it: rounded to nearest",))
    if not bool(moments.second.isfinite().all()):
        return Outcome(plain, ("its second moment has NaN or Inf: rounded to nearest",))
    hessian = moments.second.float().clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1.0
    factor, damped, notes = _factorize(hessian, options)
    if factor is None:
        return Outcome(plain, (*notes, "its second moment is not positive definite: rounded to "
                               "nearest"))  # fmt: skip
    target = weight.float()
    if options.feedback and moments.cross is not None:
        pull = torch.linalg.solve(damped, (target @ moments.cross).T).T
        target = target + pull.mul_(options.feedback)
    made = _compensate(target, scheme, hessian, factor, options)
    if _proxy(target, made, hessian) > _proxy(target, plain, hessian):
        return Outcome(plain, (*notes, "worse than round to nearest, which takes its place"))
    return Outcome(made, notes)


def _factorize(
    hessian: Tensor, options: GptqOptions
) -> tuple[Tensor | None, Tensor, tuple[str, ...]]:
    """The upper Cholesky factor of the inverse of the damped H, columns in the order in which they
    are rounded; the damped H; and what was needed for it."""
    order = _order(hessian, options)
    mean = float(hessian.diagonal().mean())
    damped = hessian
    for step in _LADDER:
        damped = hessian.clone()
        damped.diagonal().add_(options.damping * step * mean)
        ordered = damped[order][:, order]
        lower, failed = torch.linalg.cholesky_ex(ordered.double() if step > 1 else ordered)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(failed) or not bool(upper.isfinite().all()):
            continue
        notes = () if step == 1 else (f"damping raised from {options.damping:g} to "
                                      f"{options.damping * step:g}",)  # fmt: skip
        return upper.float(), damped, notes
    return None, damped, ()


def _order(hessian: Tensor, options: GptqOptions) -> Tensor:
    columns = torch.arange(hessian.shape[0], device=hessian.device)
    if not options.act_order:
        return columns
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


@dataclass(eq=False)
class _Columns:
    """Scale and zero point [G, N] for each column, in the layout [K, N] of the work."""

    scale: Tensor
    zero_point: Tensor
    group: Tensor  # int64 [K]: the row of ``scale`` for each column

    @classmethod
    def of(cls, qparams: QParams, rows: int, columns: int) -> "_Columns":
        scale = qparams.scale.float().expand(rows, -1).T.contiguous()
        zero_point = torch.zeros_like(scale)
        if qparams.zero_point is not None:
            zero_point = qparams.zero_point.float().expand(rows, -1).T.contiguous()
        group = torch.arange(columns, device=scale.device) // (columns // scale.shape[0])
        return cls(scale, zero_point, group)


def _compensate(
    weight: Tensor, scheme: WeightScheme, hessian: Tensor, factor: Tensor, options: GptqOptions
) -> QuantizedWeight:
    """Algorithm 1: rounds column after column; the rest takes up the error."""
    rows, columns = weight.shape
    order = _order(hessian, options)
    importance = hessian.diagonal()
    qparams = search_qparams(weight, scheme, importance, options)
    scales = _Columns.of(qparams, rows, columns)
    size = scheme.group_size if not options.act_order else None
    work = weight.T[order].contiguous()  # [K, N]: a column of the weight is a row here
    fmt = scheme.int_format
    for start in range(0, columns, options.block):
        end = min(start + options.block, columns)
        errors = torch.empty(end - start, rows, device=weight.device)
        for i in range(start, end):
            if size is not None and i % size == 0:
                _rescale(
                    work, i, i + size, factor, start, errors, scales, scheme, importance, options
                )
            group = int(scales.group[order[i]])
            scale, zero_point = scales.scale[group], scales.zero_point[group]
            codes = (work[i] / scale).round_().add_(zero_point).clamp_(fmt.qmin, fmt.qmax)
            near = codes.sub_(zero_point).mul_(scale)
            error = torch.sub(work[i], near, out=errors[i - start]).div_(factor[i, i])
            work[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
            work[i] = near
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    near = torch.empty_like(work)
    near[order] = work
    final = QParams(
        scales.scale.T.to(scheme.torch_scale_dtype),
        None if scheme.symmetric else scales.zero_point.T.to(torch.int8),
    )
    if scheme.granularity == "tensor":
        final = qparams
    return nearest_codes(near.T.contiguous(), scheme, final)


def _rescale(
    work: Tensor,
    first: int,
    last: int,
    factor: Tensor,
    start: int,
    errors: Tensor,
    scales: _Columns,
    scheme: WeightScheme,
    importance: Tensor,
    options: GptqOptions,
) -> None:
    """Choose a group's scale anew, from the weights as the errors so far have left them."""
    group = work[first:last].clone()
    beyond = max(start + options.block, first)  # errors of this block have not reached these yet
    if last > beyond and first > start:
        done = first - start
        group[beyond - first :].addmm_(factor[start:first, beyond:last].T, errors[:done], alpha=-1)
    found = search_qparams(group.T.contiguous(), scheme, importance[first:last], options)
    index = int(scales.group[first])
    scales.scale[index] = found.scale[:, 0].float()
    if found.zero_point is not None:
        scales.zero_point[index] = found.zero_point[:, 0].float()


def _proxy(weight: Tensor, made: QuantizedWeight, hessian: Tensor) -> float:
    """``tr (W - Q) H (W - Q)^T``: the squared error of the output on the calibration inputs."""
    error = weight - made.dequantize()
    value = float((error @ hessian).mul_(error).sum(dtype=torch.float64))
    if not math.isfinite(value):
        raise UnsupportedError("its weight or its second moment is too large for float32")
    return value
