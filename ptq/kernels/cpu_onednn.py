"""CPU kernel over int8 activations: oneDNN's linear with a weight that it packed once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation
from ptq.kernels.cpu_int_mm import plain_loop, vnni_reason
from ptq.kernels.integer import integer_reason, integer_tolerance
from ptq.kernels.spec import LinearSpec, second_form


@dataclass(frozen=True)
class Packed:
    """oneDNN's opaque weight, and float32 [N] scale and int64 [N] zero point (all 0)."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class OneDnn:
    """``onednn::qlinear_pointwise``: good from two rows on, at the price of a second weight.

    The op wants uint8 activations (int8 ones run its reference code) and one scale for all of
    them, so the codes are shifted by 128 and the rows are scaled afterwards.
    """

    name: str = "onednn"
    integer: bool = True

    def supports(self, spec: LinearSpec) -> str | None:
        reason = vnni_reason(spec) or integer_reason(spec)
        if reason is not None:
            return reason
        if plain_loop() is not None:  # _int_mm is exact then, oneDNN's product is not
            return "this processor has no VNNI: oneDNN's product saturates"
        assert spec.activations is not None
        if not spec.symmetric or not spec.activations.symmetric:
            return "for symmetric weights and activations"
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return second_form(self.extra_bytes(spec))

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
        rows = weight.shape[0]
        return Packed(
            torch.ops.onednn.qlinear_prepack(weight.codes, None),
            weight.scale.float().reshape(-1).expand(rows).contiguous(),
            torch.zeros(rows, dtype=torch.int64),
        )

    def linear(self, x: Activation, prepared: Packed, dtype: torch.dtype) -> Tensor:
        assert x.scale is not None
        shifted = x.values.contiguous().view(torch.uint8).bitwise_xor(128)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 128, prepared.weight, prepared.scale, prepared.zero_point,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return y.mul_(x.scale).to(dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        return integer_tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return spec.n * spec.k + 12 * spec.n
