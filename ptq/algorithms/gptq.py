"""GPTQ: each column's rounding error is made up for by the columns that are still to be rounded.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv 2210.17323). With ``feedback`` the error that the layers before have left in
the input is made up for as well, as in Li et al. 2025, "GPTAQ" (arXiv 2504.02692): the layer should
give on its own input x what the float layer gives on the float input x + d, which is GPTQ on the
weight ``W + W C H^-1`` (:mod:`ptq.algorithms.hessian` has the letters).
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ptq.algorithms.base import InputMoments, Outcome
from ptq.algorithms.clip import ClipOptions
from ptq.algorithms.compensate import Compensation
from ptq.algorithms.descent import Descent
from ptq.algorithms.hessian import factorize, order_of, output_error
from ptq.algorithms.rtn import nearest_codes, round_to_nearest
from ptq.config import WeightScheme
from ptq.core import QuantizedWeight
from ptq.formats import IntFormat


class GptqOptions(ClipOptions):
    """GPTQ's own options, and those of the search for its scales."""

    clip: bool = Field(True, description="search clipped ranges before")
    damping: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="added to H's diagonal, as a share of its mean"
    )
    act_order: bool = Field(
        True, description="columns with large inputs first; scales from the first weights"
    )
    block: Annotated[int, Field(ge=1)] = Field(
        64, description="columns between two updates of the rest"
    )
    feedback: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the upstream error that is made up for"
    )
    refine: Annotated[int, Field(ge=0)] = Field(
        2, description="passes of descent on the codes, afterwards"
    )
    tune_scales: bool = Field(
        True, description="least squares for the scales, with each pass and at the end"
    )


class GptaqOptions(GptqOptions):
    """GPTQ with all of the upstream error made up for."""

    feedback: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="share of the upstream error that is made up for"
    )


def gptq(
    weight: Tensor, scheme: WeightScheme, moments: InputMoments | None, options: GptqOptions
) -> Outcome:
    """Quantize a weight [N, K] so that its output on the calibration inputs changes least.

    Never worse on them than round to nearest, which takes its place, with a note, where the
    moments cannot be used.
    """
    plain = round_to_nearest(weight, scheme)
    if not isinstance(scheme.number_format, IntFormat):
        note = f"{scheme.format} codes have no even steps: rounded to nearest"
        return Outcome(plain, (note,))
    if moments is None or moments.rows == 0:
        return Outcome(plain, ("no calibration row reaches it: rounded to nearest",))
    second = moments.second.float()
    if not bool(second.isfinite().all()):
        return Outcome(plain, ("its second moment has NaN or Inf: rounded to nearest",))
    weight = weight.detach().float()
    pull, notes = _pull(weight, moments, options)
    made, more = _quantized(weight, scheme, second, pull, options)
    notes += more
    if made is None:
        return Outcome(plain, notes)
    ours, theirs = (output_error(weight, q, second, pull) for q in (made, plain))
    if not ours <= theirs or ours == torch.inf:
        return Outcome(plain, (*notes, "worse than round to nearest, which takes its place"))
    return Outcome(made, notes)


def _pull(
    weight: Tensor, moments: InputMoments, options: GptqOptions
) -> tuple[Tensor | None, tuple[str, ...]]:
    """B [N, K], the share of W C that is asked for; None for zero; and notes."""
    if not options.feedback:
        return None, ()
    if moments.cross is None:
        return None, ("no float input was seen beside its own: upstream error not made up for",)
    if not bool(moments.cross.isfinite().all()):
        return None, ("its cross moment has NaN or Inf: upstream error not made up for",)
    return (weight @ moments.cross.float()).mul_(options.feedback), ()


def _quantized(
    weight: Tensor,
    scheme: WeightScheme,
    second: Tensor,
    pull: Tensor | None,
    options: GptqOptions,
) -> tuple[QuantizedWeight | None, tuple[str, ...]]:
    """GPTQ, and descent from there; None, with a note, where H cannot be factorized."""
    order = order_of(second, options.act_order)
    factor = factorize(second, order, options.damping)
    if factor is None:
        return None, ("its second moment is not positive definite: rounded to nearest",)
    target = weight
    if pull is not None:
        target = weight + torch.linalg.solve(factor.hessian, pull, left=False)
    codes = Compensation(
        scheme,
        order,
        factor.upper,
        second.diagonal(),
        options,
        options.block,
        sequential=scheme.granularity == "group" and not options.act_order,
    ).run(target)
    if options.refine or options.tune_scales:
        descent = Descent(codes, target, factor.hessian, scheme)
        for _ in range(options.refine):
            if options.tune_scales:
                descent.tune_scales()
            descent.move_codes()
        if options.tune_scales:
            descent.tune_scales()
    near = codes.values().T.contiguous()
    return nearest_codes(near, scheme, codes.qparams(scheme)), factor.notes
