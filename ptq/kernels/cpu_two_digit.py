"""CPU weight-only kernel over int8 codes: activations as two int8 digits, one integer product."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation, by_chunks, symmetric_codes
from ptq.kernels.cpu_int8pack import Int8Pack
from ptq.kernels.cpu_int_mm import int_product, one_column, plain_loop, vnni_reason
from ptq.kernels.integer import IntCodes, in_float, int_codes
from ptq.kernels.spec import LinearSpec, few_rows, floats_reason, int8_reason

_MAX_COLUMNS = 1 << 17  # 2^7 * 2^7 * K must fit int32


def two_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as ``(256 * high + low) * scale``: high over low (int8 [2M, K]) and scale (float32
    [M, 1]).

    Every element is within half of 1/32512 of its row's largest magnitude.
    """
    rows = x.shape[0]
    digits = torch.empty((2 * rows, x.shape[1]), dtype=torch.int8, device=x.device)
    codes, scale = by_chunks(lambda part: symmetric_codes(part, 127 * 256), x, torch.int16)
    digits[rows:] = codes  # the low byte, which is what is missing to the nearest multiple of 256
    digits[:rows] = codes.add_(128).bitwise_right_shift_(8)
    return digits, scale


def joined(product: Tensor) -> Tensor:
    """``256 * high + low`` [M, N] of a float32 product [2M, N], which is overwritten."""
    rows = product.shape[0] // 2
    return product[:rows].mul_(256).add_(product[rows:])


@dataclass(frozen=True)
class TwoDigit:
    """Weight-only int8 by ``aten::_int_mm``: the weight is read once for both digits.

    The rounding of x is relative to the largest value of its row: 2^-16 of it, against 2^-9 of
    each value in bfloat16. Norm-wise that is the smaller error for up to 65,536 columns.
    """

    name: str = "two_digit"
    integer: bool = False
    rows: int = 128
    large: int = 1 << 23  # weights

    def supports(self, spec: LinearSpec) -> str | None:
        reason = vnni_reason(spec)
        if reason is not None:
            return reason
        if spec.activations is not None:
            return "activations are int8 already"
        reason = int8_reason(spec) or floats_reason(spec)
        if reason is not None:
            return reason
        if spec.k > _MAX_COLUMNS:
            return f"K={spec.k} could overflow the int32 sum (at most {_MAX_COLUMNS})"
        return one_column(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        reason = plain_loop()
        if reason is not None:
            return reason
        if Int8Pack().supports(spec) is None and Int8Pack().declines(spec) is None:
            return "few rows: slower than int8pack"
        if spec.dtype == torch.float32:
            return None  # float32 products take three times as long as bfloat16 ones
        if spec.n * spec.k < self.large:
            return f"fewer than {self.large} weights: splitting x costs more than it saves"
        return few_rows(spec, self.rows)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> IntCodes:
        return int_codes(weight)

    def linear(self, x: Activation, prepared: IntCodes, dtype: torch.dtype) -> Tensor:
        digits, scale = two_digits(x.values)
        y = joined(in_float(int_product(digits, prepared.codes)))
        return y.mul_(scale).mul_(prepared.scale).to(dtype).contiguous()

    def tolerance(self, spec: LinearSpec) -> float:
        # Half a step is 2^-16 of the largest x, which is at most K times the mean.
        return spec.k * 2.0**-16 + torch.finfo(spec.dtype).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return 8 * spec.n
