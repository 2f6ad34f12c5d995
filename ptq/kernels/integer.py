"""What the kernels over integer products share: int8 codes, their limits, and the scales."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.formats import IntFormat
from ptq.kernels.activations import Activation
from ptq.kernels.spec import LinearSpec


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
    """The exact integer product [M, N] (int32, overwritten) in float32, zero points and scales
    applied.

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
    return in_float(product).mul_(x.scale).mul_(w.scale)


def in_float(product: Tensor) -> Tensor:
    """int32 to float32 in the same memory: getting new memory takes longer than the pass."""
    return product.view(torch.float32).copy_(product)


def integer_reason(spec: LinearSpec) -> str | None:
    """Why a spec cannot be computed as one integer product."""
    if spec.activations is None:
        return "activations are float"
    if not isinstance(spec.format, IntFormat):
        return f"{spec.format.name} codes are no integers"
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
