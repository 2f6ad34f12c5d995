"""CPU weight-only kernel over int8 codes: ``aten::_weight_int8pack_mm``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation, scaled
from ptq.kernels.memory import aligned
from ptq.kernels.spec import LinearSpec, few_rows, floats_reason, int8_reason

# Bytes that addresses must be a multiple of: the op's bfloat16 code crashes at others.
_CODES_AT, _VALUES_AT = 16, 32


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
    rows: int = 24
    rows_of_large: int = 8

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device != "cpu":
            return "for CPUs"
        reason = int8_reason(spec) or floats_reason(spec)
        if reason is not None:
            return reason
        if spec.dtype == torch.float16 and spec.activations is not None:
            return "the unscaled product of int8 activations could overflow float16"
        if spec.k % 16:
            return f"K={spec.k} is not a multiple of 16 (the op would read past the row)"
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return few_rows(spec, self.rows, self.rows_of_large)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Int8Packed:
        scale = weight.scale.float().reshape(1, -1).expand(1, weight.shape[0])
        # A power of two is exact in 16 bits, and keeps the op's result in their range.
        exponent = torch.exp2(scale.abs().log2().floor()).clamp_(min=2.0**-24)
        codes = aligned(weight.codes, _CODES_AT)
        return Int8Packed(codes, exponent.reshape(-1).to(_narrow(dtype)), scale / exponent)

    def linear(self, x: Activation, prepared: Int8Packed, dtype: torch.dtype) -> Tensor:
        values, row_scale = x.as_float(prepared.exponent.dtype)
        values = aligned(values.contiguous(), _VALUES_AT)
        y = torch._weight_int8pack_mm(values, prepared.codes, prepared.exponent)
        y = y.float().mul_(prepared.scale)
        return scaled(y, row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # x, the unscaled product and y are rounded.
        return 4 * torch.finfo(_narrow(spec.dtype)).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return spec.n * (4 + _narrow(spec.dtype).itemsize)


def _narrow(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float32 else dtype
