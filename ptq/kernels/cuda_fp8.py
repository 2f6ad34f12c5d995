"""CUDA kernel over float8 codes and float8 activations: row-wise scaled matmul."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.formats import FLOAT8
from ptq.kernels.activations import Activation
from ptq.kernels.spec import LinearSpec

_CAPABILITY = (8, 9)  # Ada and Hopper are the first with float8 units


@dataclass(frozen=True)
class CudaFloat8:
    """``aten::_scaled_mm`` with a scale for each row of x and each output channel; sums in float32.

    The weight is column-major as it is stored, so nothing is copied.
    """

    name: str = "cuda_fp8"
    integer: bool = True
    ops: Any = torch

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device != "cuda":
            return "for CUDA devices"
        if spec.format != FLOAT8 or spec.activations is None or spec.granularity.kind == "group":
            return (
                "for float8 weights with per-channel or per-tensor scales, and float8 activations"
            )
        if spec.dtype != torch.bfloat16:
            return "the op gives bfloat16"
        if spec.k % 16 or spec.n % 16:
            return f"N={spec.n} and K={spec.k} must be multiples of 16"
        if not self.ops.cuda.is_available():
            return "there is no GPU here to ask for its compute capability: float8 needs 8.9"
        found = self.ops.cuda.get_device_capability()
        if found < _CAPABILITY:
            return f"compute capability {found[0]}.{found[1]}: float8 needs 8.9"
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Codes [K, N], column-major, and float32 scales [1, N]."""
        scale = weight.scale.float().reshape(1, -1).expand(1, weight.shape[0])
        return weight.codes.t(), scale.contiguous()

    def linear(self, x: Activation, prepared: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = prepared
        y: Tensor = self.ops._scaled_mm(
            x.values.contiguous(), codes, scale_a=x.scale, scale_b=scale, out_dtype=dtype
        )
        return y

    def tolerance(self, spec: LinearSpec) -> float:
        # The units add float8 products with fewer than 24 bits; the result is rounded to bfloat16.
        return torch.finfo(torch.bfloat16).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return 0 if spec.granularity.kind == "channel" else 4 * spec.n
