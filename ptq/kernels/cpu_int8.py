"""CPU kernels over int8 codes: torch's integer matmul, and its weight-only GEMV."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation, scaled
from ptq.kernels.spec import FLOATS, LinearSpec


@dataclass(frozen=True)
class IntCodes:
    """int8 codes [N, K] with per-channel scale and zero point, and the sum of each row."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    row_sum: Tensor


def int_codes(weight: QuantizedWeight) -> IntCodes:
    """Codes of a per-channel or per-tensor weight; 8-bit codes are shared, not copied."""
    codes = weight.codes
    zero_point = weight.zero_point
    return IntCodes(
        codes,
        weight.scale.float().reshape(1, -1),
        None if zero_point is None else zero_point.to(torch.int32).reshape(1, -1),
        codes.sum(dim=1, dtype=torch.int32).reshape(1, -1),
    )


def apply_scales(product: Tensor, x: Activation, w: IntCodes) -> Tensor:
    """The exact integer product [M, N] (int32) to float32, zero points and scales applied.

    ``sum (x - zx)(w - zw) = sum x w - zx sum w - zw sum x + K zx zw``, in int32.
    """
    assert x.scale is not None
    if x.zero_point is not None:
        product = product - x.zero_point * w.row_sum
    if w.zero_point is not None:
        row_sum = x.values.sum(dim=1, keepdim=True, dtype=torch.int32)
        if x.zero_point is not None:
            row_sum = row_sum - x.values.shape[1] * x.zero_point
        product = product - row_sum * w.zero_point
    return product.float().mul_(x.scale).mul_(w.scale)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def int_mm_is_exact() -> bool:
    """Whether this processor's ``_int_mm`` gives exact sums.

    oneDNN multiplies int8 by vpmaddubsw where a processor has no VNNI (before Cascade Lake and
    Zen 4), which adds neighbouring products in 16 bits and saturates.
    """
    return _probe()


@cache
def _probe() -> bool:
    """Half the codes are at their ends, so a product that saturates differs."""
    codes = torch.full((32, 64), 127, dtype=torch.int8)
    codes[::2] = -128
    return torch.equal(torch._int_mm(codes, codes.t()).float(), codes.float() @ codes.t().float())


@dataclass(frozen=True)
class IntMM:
    """``aten::_int_mm`` on int8 activations: exact int32 sums, any shape."""

    name: str = "int_mm"
    integer: bool = True

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device != "cpu":
            return "for CPUs"
        if not int_mm_is_exact():
            return "this processor has no VNNI: its integer product saturates"
        return integer_reason(spec)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> IntCodes:
        return int_codes(weight)

    def linear(self, x: Activation, prepared: IntCodes, dtype: torch.dtype) -> Tensor:
        product = torch._int_mm(x.values, prepared.codes.t())
        return apply_scales(product, x, prepared).to(dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        return integer_tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return integer_bytes(spec)


def integer_reason(spec: LinearSpec) -> str | None:
    """Why a spec cannot be computed as one integer product."""
    if spec.activations is None:
        return "activations are float"
    if spec.granularity.kind == "group":
        return f"scales per {spec.granularity} group cannot leave the sum"
    if spec.k > max_columns(spec):
        return f"K={spec.k} could overflow the int32 sum (at most {max_columns(spec)})"
    return None


def integer_tolerance(spec: LinearSpec) -> float:
    """The product is exact; its scales and the result are rounded."""
    return torch.finfo(spec.dtype).eps + 4 * torch.finfo(torch.float32).eps


def integer_bytes(spec: LinearSpec) -> int:
    """Of :class:`IntCodes` beyond the canonical weight."""
    unpacked = 0 if spec.format.bits == 8 else spec.n * spec.k
    return unpacked + (4 if spec.symmetric else 8) * spec.n


def max_columns(spec: LinearSpec) -> int:
    """K for which the sum surely fits int32: a factor is at most 2^7, 2^8 with a zero point."""
    assert spec.activations is not None
    factor_bits = 14 + (not spec.symmetric) + (not spec.activations.symmetric)
    return 1 << (31 - factor_bits)


@dataclass(frozen=True)
class Int8Packed:
    """int8 codes [N, K], which are the canonical ones, and their scale ``exponent * scale``.

    Args:
        exponent: [N], a power of two, which the op applies.
        scale: float32 [1, N], which is applied to the op's result.
    """

    codes: Tensor
    exponent: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Int8Pack:
    """``aten::_weight_int8pack_mm``: weight-only, reads each code once; good for a few rows.

    Activations of float32 are rounded to bfloat16 first: the op is 30 times slower in float32.
    Not for zero points: the op rounds its sum before the zero point's share could be subtracted,
    and what is left of the difference may be mostly rounding.
    """

    name: str = "int8pack"
    integer: bool = False
    rows: int = 16

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device != "cpu":
            return "for CPUs"
        if spec.format.bits != 8 or spec.granularity.kind == "group" or not spec.symmetric:
            return "for symmetric int8 codes with per-channel or per-tensor scales"
        if spec.dtype not in FLOATS:
            return f"for {', '.join(str(dtype) for dtype in FLOATS)} activations"
        if spec.dtype == torch.float16 and spec.activations is not None:
            return "the unscaled product of int8 activations could overflow float16"
        if spec.k % 16:
            return f"K={spec.k} is not a multiple of 16 (the op would read past the row)"
        if spec.m > self.rows:
            return f"more than {self.rows} rows: slower than dequantizing"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Int8Packed:
        scale = weight.scale.float().reshape(1, -1).expand(1, weight.shape[0])
        # A power of two is exact in 16 bits, and keeps the op's result in their range.
        exponent = torch.exp2(scale.abs().log2().floor()).clamp_(min=2.0**-24)
        return Int8Packed(weight.codes, exponent.reshape(-1).to(_narrow(dtype)), scale / exponent)

    def linear(self, x: Activation, prepared: Int8Packed, dtype: torch.dtype) -> Tensor:
        values, row_scale = x.as_float(prepared.exponent.dtype)
        y = torch._weight_int8pack_mm(values.contiguous(), prepared.codes, prepared.exponent)
        y = y.float().mul_(prepared.scale)
        return scaled(y, row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # x, the unscaled product and y are rounded.
        return 4 * torch.finfo(_narrow(spec.dtype)).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return spec.n * (4 + _narrow(spec.dtype).itemsize)


def _narrow(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float32 else dtype
