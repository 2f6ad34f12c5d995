"""The float weight, kept: what a quantized layer falls back to where no kernel is faster."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation, scaled
from ptq.kernels.spec import LinearSpec, second_form


@dataclass(frozen=True)
class Resident:
    """Dequantizes once and keeps the result: at least the speed of the float layer, at its memory.

    On a CPU oneDNN packs the weight once, where a float layer does it at every call: 1.2x to 1.7x
    of ``F.linear`` at 576 x 1536 and up to 128 rows, even at 512 (bfloat16, Zen 4). float16
    activations are multiplied in float32, because quantized ones could overflow.
    """

    name: str = "resident"
    integer: bool = False

    def supports(self, spec: LinearSpec) -> str | None:
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return second_form(self.extra_bytes(spec))

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        floats = weight.dequantize(_compute(dtype))
        if floats.device.type == "cpu" and _packable(floats.dtype):
            packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(floats, None)
            return packed
        return floats

    def linear(self, x: Activation, prepared: Tensor, dtype: torch.dtype) -> Tensor:
        values, row_scale = x.as_float(prepared.dtype)
        if prepared.is_mkldnn:
            y = torch.ops.mkldnn._linear_pointwise(values, prepared, None, "none", [], "")
        else:
            y = torch.nn.functional.linear(values, prepared)
        return scaled(y, row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # x - zero point, the weight, the product and the scaled product are rounded.
        return 4 * torch.finfo(spec.dtype).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return spec.n * spec.k * _compute(spec.dtype).itemsize


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _packable(dtype: torch.dtype) -> bool:
    """Whether oneDNN takes the dtype on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return dtype == torch.float32
