"""CPU kernels of ptq's own, over the canonical codes at any number of rows (``ptq/native``)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.formats import FORMATS, IntFormat
from ptq.kernels.activations import Activation
from ptq.kernels.integer import integer_reason, integer_tolerance
from ptq.kernels.spec import LinearSpec
from ptq.native import native_reason

_DTYPES = (torch.float32, torch.bfloat16)
_COLUMNS = 64  # K is a multiple of it
_LONGEST = 1 << 19  # columns: x is shifted to at most 255, int4 codes are at most 15 from zero
_ROWS_OF_INT4 = 9  # the first number of rows that are multiplied in tiles


def native_spec_reason(spec: LinearSpec) -> str | None:
    """Why the kernels do not take the spec, whatever its activations are."""
    if spec.device != "cpu":
        return "for CPUs"
    if spec.dtype not in _DTYPES:
        return "for float32 and bfloat16 activations"
    if spec.k % _COLUMNS:
        return f"K={spec.k} is not a multiple of {_COLUMNS}"
    reason: str | None = native_reason()
    return reason


@dataclass(frozen=True)
class NativeCodes:
    """int8 codes [N, K], float32 scale [N] and 128 times the sums of the rows (int32 [N]), which
    shifting the activations to uint8 adds."""

    codes: Tensor
    scale: Tensor
    sums: Tensor


@dataclass(frozen=True)
class NativeInt8:
    """int8 activations and symmetric int8 weights: exact int32 sums, scaled in the same pass."""

    name: str = "native_int8"
    integer: bool = True

    def supports(self, spec: LinearSpec) -> str | None:
        reason = integer_reason(spec)
        if reason is not None:
            return reason
        assert spec.activations is not None
        if not spec.symmetric or not spec.activations.symmetric or spec.format.bits != 8:
            return "for symmetric int8 weights and activations"
        return native_spec_reason(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> NativeCodes:
        sums = weight.codes.sum(dim=1, dtype=torch.int32).mul_(128)
        return NativeCodes(weight.codes.contiguous(), _scale_of_rows(weight), sums)

    def linear(self, x: Activation, prepared: NativeCodes, dtype: torch.dtype) -> Tensor:
        assert x.scale is not None
        rows = x.values.shape[0]
        scale = x.scale if x.scale.shape[0] == rows else x.scale.expand(rows, 1).contiguous()
        y: Tensor = torch.ops.ptq.linear_int8(
            x.values.contiguous(), scale, prepared.codes, prepared.scale, prepared.sums, dtype
        )
        return y

    def tolerance(self, spec: LinearSpec) -> float:
        return integer_tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return 8 * spec.n


@dataclass(frozen=True)
class NativeWeight:
    """Packed codes; scales [N, groups] in float16 or float32, of rows [N, 1] in float32."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class NativeInt4:
    """int8 activations and weights of 4 bits: exact int32 sums of each group, scaled in float32."""

    name: str = "native_int4"
    integer: bool = True

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.activations is None or not isinstance(FORMATS[spec.activations.format], IntFormat):
            return "for int8 activations"
        if not spec.activations.symmetric:
            return "for symmetric activations"
        if not isinstance(spec.format, IntFormat) or spec.format.bits != 4:
            return "for int4 weights"
        if spec.k > _LONGEST:
            return f"K={spec.k} could overflow the int32 sum (at most {_LONGEST})"
        return _group_reason(spec) or native_spec_reason(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        if spec.m < _ROWS_OF_INT4:
            return f"fewer than {_ROWS_OF_INT4} rows: products in bfloat16 are faster"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> NativeWeight:
        return _native_weight(weight)

    def linear(self, x: Activation, prepared: NativeWeight, dtype: torch.dtype) -> Tensor:
        assert x.scale is not None
        rows = x.values.shape[0]
        scale = x.scale if x.scale.shape[0] == rows else x.scale.expand(rows, 1).contiguous()
        y: Tensor = torch.ops.ptq.linear_groups(
            x.values.contiguous(),
            scale,
            prepared.packed,
            prepared.scale,
            prepared.zero_point,
            dtype,
        )
        return y

    def tolerance(self, spec: LinearSpec) -> float:
        groups = spec.k // (spec.granularity.group_size or spec.k)
        return integer_tolerance(spec) + 2 * groups * torch.finfo(torch.float32).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return _native_bytes(spec)


@dataclass(frozen=True)
class NativeFloat:
    """Weights of 4 or 8 bits, which become bfloat16 on the way to the product: some rows of W at a
    time, in a cache, once for all rows of x.

    Activations of float32 are rounded to bfloat16.
    """

    name: str = "native_float"
    integer: bool = False

    def supports(self, spec: LinearSpec) -> str | None:
        if not isinstance(spec.format, IntFormat) or spec.format.bits not in (4, 8):
            return "for int4 and int8 weights"
        return _group_reason(spec) or native_spec_reason(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        if spec.activations is not None and spec.format.bits == 8 and integer_reason(spec) is None:
            return "integer products are faster"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> NativeWeight:
        return _native_weight(weight)

    def linear(self, x: Activation, prepared: NativeWeight, dtype: torch.dtype) -> Tensor:
        values, scale = x.as_float(torch.bfloat16)
        if scale is not None and scale.shape[0] != values.shape[0]:
            scale = scale.expand(values.shape[0], 1).contiguous()
        y: Tensor = torch.ops.ptq.linear_float(
            values.contiguous(), scale, prepared.packed, prepared.scale, prepared.zero_point, dtype
        )
        return y

    def tolerance(self, spec: LinearSpec) -> float:
        # x, the weight and the result are rounded.
        return 4 * torch.finfo(torch.bfloat16).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return _native_bytes(spec)


def _group_reason(spec: LinearSpec) -> str | None:
    group = spec.granularity.group_size
    return f"groups of {group} are no multiple of 32" if group is not None and group % 32 else None


def _native_weight(weight: QuantizedWeight) -> NativeWeight:
    zero_point = weight.zero_point
    scale = weight.scale
    if weight.granularity.kind != "group":
        scale = _scale_of_rows(weight)
        if zero_point is not None:
            zero_point = zero_point.expand(scale.shape)
    elif scale.dtype != torch.float16:
        scale = scale.float()
    if zero_point is not None:
        zero_point = zero_point.to(torch.int8).contiguous()
    return NativeWeight(weight.packed.contiguous(), scale.contiguous(), zero_point)


def _native_bytes(spec: LinearSpec) -> int:
    """Of :class:`NativeWeight` beyond the canonical weight."""
    return 4 * spec.n if spec.granularity.kind != "group" else 0


def _scale_of_rows(weight: QuantizedWeight) -> Tensor:
    """float32 [N, 1]."""
    return weight.scale.float().reshape(-1, 1).expand(weight.shape[0], 1).contiguous()
