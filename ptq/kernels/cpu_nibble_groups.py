"""CPU weight-only kernel over nibbles: a layout that torch dequantizes in one pass."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation, scaled
from ptq.kernels.dequantize import compute_dtype, multiply_blocks
from ptq.kernels.nibbles import TAIL, has_op, unpacked
from ptq.kernels.spec import LinearSpec, floats_reason, second_form

_BLOCK = 1 << 20  # weights at a time
_SMALLEST = 2.0**-14  # normal number of float16


@dataclass(frozen=True)
class NibbleGroups:
    """Groups with their scale and bias behind them, uint8 [N * K / G, G / 2 + 4].

    Args:
        exponent: float32 [1, 1], a power of two that the scales were divided by, so that they are
            in float16's range.
        group: columns of a group, G.
        columns: K.
    """

    rows: Tensor
    exponent: Tensor
    group: int
    columns: int


@dataclass(frozen=True)
class UnpackGroups:
    """Half of what ``dequantize`` takes beside the product, for a second half byte a weight."""

    name: str = "unpack_groups"
    integer: bool = False

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device != "cpu":
            return "for CPUs"
        if spec.format.bits != 4 or spec.granularity.group_size is None:
            return "for int4 codes in groups"
        if spec.granularity.group_size % 2:
            return f"groups of {spec.granularity.group_size} do not fill their bytes"
        if not has_op():
            return "this torch has no quantized::embedding_bag_4bit_unpack"
        return floats_reason(spec)

    def declines(self, spec: LinearSpec) -> str | None:
        return second_form(self.extra_bytes(spec))

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> NibbleGroups:
        group = weight.granularity.group_size
        assert group is not None
        scale = weight.scale.float().reshape(-1, 1)
        exponent = torch.exp2(scale.abs().amax().clamp(min=1e-30).log2().floor())
        scale = scale / exponent
        # Smaller ones would be subnormal, which the op is slow on; such weights are nearly nothing.
        scale = scale.abs().clamp(min=_SMALLEST).copysign(scale)
        zero_point = 0 if weight.zero_point is None else weight.zero_point.float().reshape(-1, 1)
        tail = torch.cat((scale, -(8 + zero_point) * scale), dim=1).half()
        codes = weight.packed.reshape(-1, group // 2)
        rows = torch.cat((codes, tail.view(torch.uint8)), dim=1)
        return NibbleGroups(rows, exponent.reshape(1, 1), group, weight.shape[1])

    def linear(self, x: Activation, prepared: NibbleGroups, dtype: torch.dtype) -> Tensor:
        values, row_scale = x.as_float(compute_dtype("cpu", dtype, 4))
        groups = prepared.columns // prepared.group
        rows = prepared.rows.view(-1, groups, prepared.rows.shape[1])

        def fill(part: slice, block: Tensor) -> None:
            block.view(-1, prepared.group).copy_(unpacked(rows[part].flatten(0, 1)))

        step = max(1, _BLOCK // prepared.columns)
        y = multiply_blocks(values, rows.shape[0], step, fill, prepared.exponent)
        return scaled(y, row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # x - zero point, the weight, the product and the scaled product are rounded; and in float16
        # the scale, and the bias of up to 24 steps of it.
        compute = compute_dtype(spec.device, spec.dtype, 4)
        return 4 * torch.finfo(compute).eps + 24 * torch.finfo(torch.float16).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        group = spec.granularity.group_size
        assert group is not None
        return spec.n * (spec.k // group) * (group // 2 + TAIL)
