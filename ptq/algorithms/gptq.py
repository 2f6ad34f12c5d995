"""GPTQ: each column's rounding error is made up for by the columns that are still to be rounded.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv 2210.17323). With ``feedback`` the error that the layers before have left in
the input is made up for as well, as in Li et al. 2025, "GPTAQ" (arXiv 2504.02692): the layer should
give on its own input x what the float layer gives on the float input x + d, which is GPTQ on the
weight ``W + W C H^-1`` (:mod:`ptq.algorithms.hessian` has the letters).
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from ptq.algorithms.base import InputMoments, Outcome
from ptq.algorithms.clip import ClipOptions
from ptq.algorithms.compensate import Compensation
from ptq.algorithms.descent import Descent
from ptq.algorithms.hessian import factorize, falling, grouped, in_order, output_error
from ptq.algorithms.rtn import nearest_codes, round_to_nearest
from ptq.config import WeightScheme
from ptq.core import QuantizedWeight
from ptq.formats import IntFormat

ActOrder = Literal["none", "static", "permuted"]


def _from_flag(value: Any) -> Any:
    return {True: "static", False: "none"}[value] if isinstance(value, bool) else value


class GptqOptions(ClipOptions):
    """GPTQ's own options, and those of the search for its scales."""

    clip: bool = Field(True, description="search clipped ranges before")
    damping: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="added to H's diagonal, as a share of its mean"
    )
    act_order: Annotated[
        ActOrder, BeforeValidator(_from_flag, json_schema_input_type=ActOrder | bool)
    ] = Field(
        "static",
        description="columns with large inputs first. static (true): groups of neighbours, scales "
        "from the first weights; permuted: groups of inputs alike in size, each scale from the "
        "weights when its group is reached, and a layer that sorts its input; none (false)",
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
    order = None
    if orders_inputs(scheme, options):
        order = torch.arange(weight.shape[1], device=weight.device)
        plain = replace(plain, input_order=order.to(torch.int32))
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
    form = _Form(weight, second, pull)
    theirs = form.error(plain)
    if order is not None:
        order = grouped(second, scheme.granularity_value.group_size or len(second))
        form = form.sorted(order)
    made, more = _quantized(form, scheme, options)
    notes += more
    if made is None:
        return Outcome(plain, notes)
    ours = form.error(made)
    if not ours <= theirs or ours == torch.inf:
        return Outcome(plain, (*notes, "worse than round to nearest, which takes its place"))
    if order is not None:
        made = replace(made, input_order=order.to(torch.int32))
    return Outcome(made, notes)


def orders_inputs(scheme: WeightScheme, options: GptqOptions) -> bool:
    """Whether the codes have an ``input_order``: with one scale for a row there is nothing to
    sort, and ``permuted`` is as ``static``."""
    integers = isinstance(scheme.number_format, IntFormat)
    return options.act_order == "permuted" and scheme.granularity == "group" and integers


@dataclass(frozen=True, eq=False)
class _Form:
    """The quadratic form of a layer: W [N, K], H [K, K], and B [N, K] or None, all float32."""

    weight: Tensor
    second: Tensor
    pull: Tensor | None

    def sorted(self, order: Tensor) -> "_Form":
        """With the columns in this order."""
        pull = None if self.pull is None else self.pull[:, order]
        return _Form(self.weight[:, order], in_order(self.second, order), pull)

    def error(self, made: QuantizedWeight) -> float:
        """See :func:`~ptq.algorithms.hessian.output_error`; of codes in the order of the form."""
        return output_error(self.weight, made, self.second, self.pull)


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
    form: _Form, scheme: WeightScheme, options: GptqOptions
) -> tuple[QuantizedWeight | None, tuple[str, ...]]:
    """GPTQ, and descent from there; None, with a note, where H cannot be factorized."""
    sequential = scheme.granularity == "group" and options.act_order != "static"
    order = None if sequential or options.act_order == "none" else falling(form.second)
    factor = factorize(form.second, order, options.damping)
    if factor is None:
        return None, ("its second moment is not positive definite: rounded to nearest",)
    target = form.weight
    if form.pull is not None:
        target = target + torch.linalg.solve(factor.hessian, form.pull, left=False)
    importance = form.second.diagonal()
    codes = Compensation(
        scheme, order, factor.upper, importance, options, options.block, sequential
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
