"""CPU kernel over int8 codes and int8 activations: torch's integer matmul."""

import platform
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation
from ptq.kernels.cpu_int8pack import Int8Pack
from ptq.kernels.integer import (
    IntCodes,
    apply_scales,
    int_codes,
    integer_bytes,
    integer_reason,
    integer_tolerance,
)
from ptq.kernels.spec import LinearSpec

_LARGE = 1 << 23  # weights; such a weight is not put in the op's second place
_MANY_ROWS = 256


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


def vnni_reason(spec: LinearSpec) -> str | None:
    """Why integer products on this processor cannot be relied on."""
    if spec.device != "cpu":
        return "for CPUs"
    if not int_mm_is_exact():
        return "this processor has no VNNI: its integer product saturates"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_vnni() -> bool:
    """Whether this processor multiplies int8 in one instruction, if it is an x86; else true."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_vnni_supported()


def plain_loop() -> str | None:
    """Why integer products are slow on this processor.

    Without VNNI torch 2.13 multiplies int8 in a plain loop: 1536 x 576 by 512 rows takes 34 times
    as long as in float32 on a Zen 3 (268 against 7.8 ms).
    """
    if not has_vnni():
        return "this processor has no VNNI: the op is a plain loop, slower than float"
    return None


def int_product(x: Tensor, w: Tensor) -> Tensor:
    """The exact product [M, N] (int32) of x [M, K] and w [N, K] (int8); strides may be any.

    oneDNN reorders the second factor at every call. Where that costs more than writing the result
    the other way round, the weight comes first. Not for a single row: torch 2.13 returns garbage
    for a second factor [K, 1] with strides such as (1, 2), which torch.compile makes.
    """
    if 1 < x.shape[0] <= _MANY_ROWS and w.numel() >= _LARGE:
        return torch._int_mm(w, x.t()).t()
    return torch._int_mm(x, w.t())


def one_column(spec: LinearSpec) -> str | None:
    """Why a weight [N, 1] is refused: the op misreads its strides (1, 1) (torch 2.13)."""
    return "K=1: the op would read past the weight" if spec.k == 1 else None


@dataclass(frozen=True)
class IntMM:
    """``aten::_int_mm`` on int8 activations: exact int32 sums, any shape."""

    name: str = "int_mm"
    integer: bool = True

    def supports(self, spec: LinearSpec) -> str | None:
        return vnni_reason(spec) or one_column(spec) or integer_reason(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        reason = plain_loop()
        if reason is not None:
            return reason
        if 2 <= spec.m <= 6 and Int8Pack().supports(spec) is None:
            return "2 to 6 rows: slower than int8pack"
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> IntCodes:
        return int_codes(weight)

    def linear(self, x: Activation, prepared: IntCodes, dtype: torch.dtype) -> Tensor:
        product = int_product(x.values, prepared.codes)
        return apply_scales(product, x, prepared).to(dtype).contiguous()

    def tolerance(self, spec: LinearSpec) -> float:
        return integer_tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return integer_bytes(spec)
