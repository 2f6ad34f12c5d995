"""CUDA kernels over the canonical codes, as Triton programs: no second form of the weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.formats import Format
from ptq.kernels.activations import Activation
from ptq.kernels.integer import integer_reason, integer_tolerance
from ptq.kernels.spec import LinearSpec, few_rows
from ptq.kernels.triton_launch import (
    float_linear,
    float_linear_op,
    integer_linear,
    integer_linear_op,
)
from ptq.kernels.triton_ready import triton_reason


@dataclass(frozen=True)
class TritonWeight:
    """The canonical codes with what the programs read beside them.

    Args:
        scale: [N, groups].
        zero_point: int8, shaped like scale, or None.
        row_sum: int32 [N], of the codes; None for float activations.
        group: the group size; 0 for one scale a row.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    row_sum: Tensor | None
    group: int
    packed: bool

    @classmethod
    def of(cls, weight: QuantizedWeight, sums: bool) -> "TritonWeight":
        rows = weight.shape[0]
        zero_point = weight.zero_point
        return cls(
            weight.packed,
            weight.scale.expand(rows, -1).contiguous(),
            None if zero_point is None else zero_point.expand(rows, -1).contiguous(),
            weight.codes.sum(dim=1, dtype=torch.int32) if sums else None,
            weight.granularity.group_size or 0,
            weight.format.bits == 4,
        )


def unreadable(fmt: Format, columns: int) -> str | None:
    """Why the programs cannot read rows of so many codes on a GPU."""
    if fmt.name not in ("int4", "int8"):
        return f"for int8 and int4 codes, not {fmt.name}"
    if fmt.bits == 4 and columns % 2:
        return f"K={columns} must be even for packed codes"
    reason: str | None = triton_reason()
    return reason


def codes_reason(spec: LinearSpec) -> str | None:
    """Why the programs do not serve a layer's device or codes."""
    return "for CUDA devices" if spec.device != "cuda" else unreadable(spec.format, spec.k)


def kept_bytes(spec: LinearSpec) -> int:
    """Of the scale and zero point of a whole weight, repeated for each row."""
    return 5 * spec.n if spec.granularity.kind == "tensor" else 0


@dataclass(frozen=True)
class TritonInt8:
    """int8 activations times int8 or int4 codes in int32; zero points and scales on the sum."""

    name: str = "triton_int8"
    integer: bool = True

    def supports(self, spec: LinearSpec) -> str | None:
        return codes_reason(spec) or integer_reason(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> TritonWeight:
        return TritonWeight.of(weight, sums=True)

    def linear(self, x: Activation, prepared: TritonWeight, dtype: torch.dtype) -> Tensor:
        w = prepared
        assert x.scale is not None and w.row_sum is not None
        call = integer_linear_op if torch.compiler.is_compiling() else integer_linear
        y: Tensor = call(
            x.values.contiguous(), x.scale, x.zero_point, w.codes, w.scale, w.zero_point,
            w.row_sum, w.packed, dtype,
        )  # fmt: skip
        return y

    def tolerance(self, spec: LinearSpec) -> float:
        return integer_tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return kept_bytes(spec) + 4 * spec.n


@dataclass(frozen=True)
class TritonFloat:
    """Float activations, some dozen rows: the codes become float on their way to the product."""

    name: str = "triton_float"
    integer: bool = False
    rows: int = 128

    def supports(self, spec: LinearSpec) -> str | None:
        reason = codes_reason(spec)
        if reason is not None:
            return reason
        group = spec.granularity.group_size or 0
        if group & (group - 1) or group > 256 or 0 < group < 8:
            return f"groups of {group}: a power of two from 8 to 256"
        if spec.dtype == torch.float16 and group:
            return "float16 may not hold a small weight of a group"
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return "for bfloat16 and float16 activations"
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return few_rows(spec, self.rows)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> TritonWeight:
        return TritonWeight.of(weight, sums=False)

    def linear(self, x: Activation, prepared: TritonWeight, dtype: torch.dtype) -> Tensor:
        w = prepared
        values, x_scale = x.as_float(dtype)
        call = float_linear_op if torch.compiler.is_compiling() else float_linear
        y: Tensor = call(
            values.contiguous(), x_scale, w.codes, w.scale, w.zero_point, w.group, w.packed
        )
        return y

    def tolerance(self, spec: LinearSpec) -> float:
        # x - zero point, the weight and the scaled product are rounded.
        return 4 * torch.finfo(spec.dtype).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return kept_bytes(spec)
