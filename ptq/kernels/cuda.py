"""CUDA kernels: torch's integer matmul and tinygemm int4, within their documented limits.

Each kernel reaches its op through ``ops``, so that the tests can put a stand-in there that
enforces the op's contract on a machine without a GPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation, scaled
from ptq.kernels.cpu_int4 import Int4Prepared, nibble_reason, op_group, scales_and_zeros
from ptq.kernels.integer import (
    IntCodes,
    apply_scales,
    int_codes,
    integer_bytes,
    integer_reason,
    integer_tolerance,
)
from ptq.kernels.spec import LinearSpec, few_rows

_MIN_ROWS = 17  # _int_mm on CUDA wants more than 16 rows


@dataclass(frozen=True)
class CudaIntMM:
    """``aten::_int_mm``: M > 16, K and N multiples of 8; fewer rows are padded with zeros."""

    name: str = "cuda_int_mm"
    integer: bool = True
    ops: Any = torch

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device != "cuda":
            return "for CUDA devices"
        if spec.k % 8 or spec.n % 8:
            return f"N={spec.n} and K={spec.k} must be multiples of 8"
        return integer_reason(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> IntCodes:
        return int_codes(weight)

    def linear(self, x: Activation, prepared: IntCodes, dtype: torch.dtype) -> Tensor:
        rows = x.values.shape[0]
        values = x.values
        if rows < _MIN_ROWS:
            values = torch.nn.functional.pad(values, (0, 0, 0, _MIN_ROWS - rows))
        product: Tensor = self.ops._int_mm(values.contiguous(), prepared.codes.t())[:rows]
        return apply_scales(product, x, prepared).to(dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        return integer_tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return integer_bytes(spec)


@dataclass(frozen=True)
class CudaInt4:
    """``aten::_weight_int4pack_mm`` (tinygemm): bfloat16, N % 8, K % 128."""

    name: str = "cuda_int4pack"
    integer: bool = False
    rows: int = 16
    inner_k_tiles: int = 8
    ops: Any = torch

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device != "cuda":
            return "for CUDA devices"
        reason = nibble_reason(spec)
        if reason is not None:
            return reason
        if spec.dtype != torch.bfloat16:
            return "the op takes bfloat16 activations"
        if spec.n % 8 or spec.k % (self.inner_k_tiles * 16):
            return f"N={spec.n} must be a multiple of 8, K={spec.k} of {self.inner_k_tiles * 16}"
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return few_rows(spec, self.rows)

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Int4Prepared:
        group = op_group(LinearSpec.of(weight, None, "cuda", dtype, 1))
        assert group is not None
        unsigned = (weight.codes + 8).to(torch.uint8)
        # The op's nibble order: the even column in the high half of the byte.
        packed = unsigned[:, 0::2] << 4 | unsigned[:, 1::2]
        tiles = self.ops._convert_weight_to_int4pack(packed.contiguous(), self.inner_k_tiles)
        return Int4Prepared(tiles, scales_and_zeros(weight, group), group)

    def linear(self, x: Activation, prepared: Int4Prepared, dtype: torch.dtype) -> Tensor:
        values, row_scale = x.as_float(torch.bfloat16)
        y: Tensor = self.ops._weight_int4pack_mm(
            values.contiguous(), prepared.packed, prepared.group, prepared.scales_and_zeros
        )
        return scaled(y, row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        return (4 if spec.symmetric else 20) * torch.finfo(torch.bfloat16).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        group = op_group(spec)
        assert group is not None
        return spec.n * spec.k // 2 + spec.n * spec.k // group * 4
