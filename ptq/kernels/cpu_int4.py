"""CPU weight-only kernel over nibbles: ``aten::_weight_int4pack_mm_for_cpu``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation, scaled
from ptq.kernels.spec import LinearSpec, few_rows, floats_reason

GROUPS = (256, 128, 64, 32)


def op_group(spec: LinearSpec) -> int | None:
    """The group size to call the op with: the scheme's own, or the largest that divides K."""
    if spec.granularity.group_size is not None:
        return spec.granularity.group_size if spec.granularity.group_size in GROUPS else None
    return next((g for g in GROUPS if spec.k % g == 0), None)


def nibble_reason(spec: LinearSpec) -> str | None:
    """Why the weight does not fit the int4 ops of torch, on any device."""
    if spec.format.bits > 4:
        return f"{spec.format.name} codes do not fit 4 bits"
    if op_group(spec) is None:
        return f"{spec.granularity} of K={spec.k}: groups must be 32, 64, 128 or 256"
    return None


def scales_and_zeros(weight: QuantizedWeight, group: int) -> Tensor:
    """bfloat16 [K / group, N, 2] for ``w = (u - 8) * scale + zero`` with u = code + 8."""
    rows, groups = weight.shape[0], weight.shape[1] // group
    scale = weight.scale.float()
    zero = torch.zeros_like(scale)
    if weight.zero_point is not None:
        zero = -weight.zero_point.float() * scale
    both = torch.stack((scale, zero), dim=-1).expand(rows, -1, 2)
    if both.shape[1] != groups:
        both = both.expand(rows, groups, 2)
    return both.transpose(0, 1).bfloat16().contiguous()


@dataclass(frozen=True)
class Int4Prepared:
    """The op's own packing (it differs by instruction set) with its scales."""

    packed: Tensor
    scales_and_zeros: Tensor
    group: int
    group_size: Tensor | None = None  # the same, for compiled code


@dataclass(frozen=True)
class Int4Pack:
    """Weight-only int4 (and int2, int3 as int4 codes): reads half a byte a weight.

    Good for a few rows. Activations and scales are rounded to bfloat16: in float32 the op is a
    hundred times slower, and in float16 small scales and large sums leave the range.
    """

    name: str = "int4pack"
    integer: bool = False
    rows: int = 72
    rows_of_large: int = 48

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device != "cpu":
            return "for CPUs"
        reason = nibble_reason(spec) or floats_reason(spec)
        if reason is not None:
            return reason
        if spec.n % 16:
            return f"N={spec.n} is not a multiple of 16"
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return few_rows(spec, self.rows, self.rows_of_large)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Int4Prepared:
        group = op_group(LinearSpec.of(weight, None, "cpu", dtype, 1))
        assert group is not None
        unsigned = weight.codes.to(torch.int32) + 8
        packed = torch._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        return Int4Prepared(packed, scales_and_zeros(weight, group), group, torch.tensor(group))

    def linear(self, x: Activation, prepared: Int4Prepared, dtype: torch.dtype) -> Tensor:
        values, row_scale = x.as_float(torch.bfloat16)
        packed, scales = prepared.packed, prepared.scales_and_zeros
        if torch.compiler.is_compiling():
            # The same op as the compiler spells it, but that the group size is given: it makes a
            # constant of a number, which it loses in nested regions (torch 2.13).
            op = torch.ops.quantized.int4mm_packed_weight_cpu
            y = op(values.contiguous(), packed, prepared.group_size, scales)
        else:
            y = torch._weight_int4pack_mm_for_cpu(
                values.contiguous(), packed, prepared.group, scales
            )
        return scaled(y, row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # x, the scale, the zero (up to 16 steps of the scale) and the result are rounded.
        return (4 if spec.symmetric else 20) * torch.finfo(torch.bfloat16).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        group = op_group(spec)
        assert group is not None
        return spec.n * spec.k // 2 + spec.n * spec.k // group * 4 + torch.int64.itemsize
