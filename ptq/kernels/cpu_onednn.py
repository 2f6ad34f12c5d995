"""CPU kernels over oneDNN's int8 linear, whose weight is packed once: a second weight, so they are
chosen only where :func:`ptq.tune` may use the memory.

``onednn::qlinear_pointwise`` wants uint8 activations (int8 ones run its reference code) and one
scale for all of them, so the codes are shifted by 128 and the rows are scaled afterwards.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq.core import Granularity, QuantizedWeight
from ptq.formats import FORMATS, IntFormat
from ptq.kernels.activations import Activation, symmetric_codes
from ptq.kernels.cpu_int_mm import plain_loop, vnni_reason
from ptq.kernels.cpu_two_digit import TwoDigit, joined, two_digits
from ptq.kernels.integer import integer_reason, integer_tolerance
from ptq.kernels.spec import LinearSpec, second_form


@dataclass(frozen=True)
class Packed:
    """oneDNN's opaque weight, and float32 [N] scale and int64 [N] zero point (all 0)."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor


def pack(codes: Tensor, scale: Tensor) -> Packed:
    """int8 codes [N, K] and their float scale, of N or of 1 element."""
    rows = codes.shape[0]
    return Packed(
        torch.ops.onednn.qlinear_prepack(codes, None),
        scale.float().reshape(-1).expand(rows).contiguous(),
        torch.zeros(rows, dtype=torch.int64),
    )


def product(codes: Tensor, packed: Packed) -> Tensor:
    """int8 codes [M, K] times the weight and its scale: float32 [M, N]."""
    shifted = codes.contiguous().view(torch.uint8).bitwise_xor(128)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, packed.weight, packed.scale, packed.zero_point,
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


def packed_bytes(spec: LinearSpec) -> int:
    return spec.n * spec.k + 12 * spec.n


def onednn_reason(spec: LinearSpec) -> str | None:
    """Why oneDNN's product is not exact on this processor, or not fast."""
    reason = vnni_reason(spec)
    if reason is None and plain_loop() is not None:  # _int_mm is exact then, oneDNN's is not
        return "this processor has no VNNI: oneDNN's product saturates"
    return reason


@dataclass(frozen=True)
class OneDnn:
    """int8 activations, symmetric weights with a scale per channel: good from two rows on."""

    name: str = "onednn"
    integer: bool = True

    def supports(self, spec: LinearSpec) -> str | None:
        reason = onednn_reason(spec) or integer_reason(spec)
        if reason is not None:
            return reason
        assert spec.activations is not None
        if not spec.symmetric or not spec.activations.symmetric:
            return "for symmetric weights and activations"
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return second_form(self.extra_bytes(spec))

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
        return pack(weight.codes, weight.scale)

    def linear(self, x: Activation, prepared: Packed, dtype: torch.dtype) -> Tensor:
        assert x.scale is not None
        return product(x.values, prepared).mul_(x.scale).to(dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        return integer_tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return packed_bytes(spec)


@dataclass(frozen=True)
class OneDnnTwoDigit:
    """Float activations as two digits (see ``two_digit``), symmetric int8 weights."""

    name: str = "onednn_two_digit"
    integer: bool = False

    def supports(self, spec: LinearSpec) -> str | None:
        return onednn_reason(spec) or TwoDigit().supports(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        return second_form(self.extra_bytes(spec))

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
        return pack(weight.codes, weight.scale)

    def linear(self, x: Activation, prepared: Packed, dtype: torch.dtype) -> Tensor:
        digits, scale = two_digits(x.values)
        return joined(product(digits, prepared)).mul_(scale).to(dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        return TwoDigit().tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return packed_bytes(spec)


@dataclass(frozen=True)
class Requantized:
    """int8 activations, weights in groups: their values rounded to int8 with a scale per channel.

    Each weight moves by up to half of 1/127 of its row's largest magnitude, which is what ``w8a8``
    rounds a weight by.
    """

    name: str = "requantized"
    integer: bool = True

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.granularity.kind != "group":
            return "for weights in groups: other codes are multiplied as they are"
        if not isinstance(spec.format, IntFormat):
            return f"{spec.format.name} codes are no integers"
        per_channel = self._rounded(spec)
        return OneDnn().supports(per_channel)

    def declines(self, spec: LinearSpec) -> str | None:
        return second_form(self.extra_bytes(spec))

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Packed:
        codes, scale = symmetric_codes(weight.dequantize(), 127)
        return pack(codes.to(torch.int8), scale)

    def linear(self, x: Activation, prepared: Packed, dtype: torch.dtype) -> Tensor:
        return OneDnn().linear(x, prepared, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # 1/254 of the row's largest weight, which is at most K times the mean.
        return spec.k / 254 + integer_tolerance(spec)

    def extra_bytes(self, spec: LinearSpec) -> int:
        return packed_bytes(spec)

    def _rounded(self, spec: LinearSpec) -> LinearSpec:
        """What the product is after rounding."""
        return replace(
            spec, format=FORMATS["int8"], granularity=Granularity("channel"), symmetric=True
        )
