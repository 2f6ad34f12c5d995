"""The float weight, kept: what a quantized layer falls back to where no kernel is faster."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation, scaled
from ptq.kernels.spec import LinearSpec, second_form


@dataclass(frozen=True)
class Resident:
    """Dequantizes once and keeps the result: the speed of the float layer, and its memory.

    float16 activations are multiplied in float32, because quantized ones could overflow.
    """

    name: str = "resident"
    integer: bool = False

    def supports(self, spec: LinearSpec) -> str | None:
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return second_form(self.extra_bytes(spec))

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        return weight.dequantize(_compute(dtype))

    def linear(self, x: Activation, prepared: Tensor, dtype: torch.dtype) -> Tensor:
        values, row_scale = x.as_float(prepared.dtype)
        return scaled(torch.nn.functional.linear(values, prepared), row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # x - zero point, the weight, the product and the scaled product are rounded.
        return 4 * torch.finfo(spec.dtype).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return spec.n * spec.k * _compute(spec.dtype).itemsize


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype
