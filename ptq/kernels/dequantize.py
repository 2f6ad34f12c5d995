"""Dequantize a block of rows that fits in cache, multiply, go on: good from some dozen rows up.

The float copy of the weight never exists as a whole, and every block is made in the same buffers.
Per-channel scales are applied to the product instead of the weight, and nibbles are not
interleaved again: the low and the high halves of the bytes are the even and the odd columns, so x
is reordered instead, once per call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight, unpack
from ptq.kernels.activations import Activation, scaled, widened
from ptq.kernels.spec import LinearSpec

_CPU_BLOCK = 1 << 20  # weights at a time: in the last-level cache
_GPU_BLOCK = 1 << 26  # the launches cost more than the memory


@dataclass(frozen=True)
class DequantizeBlocks:
    """Serves every spec, in the dtype of x; in float32 for float16, which could overflow."""

    name: str = "dequantize"
    integer: bool = False

    def supports(self, spec: LinearSpec) -> str | None:
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
        return weight

    def linear(self, x: Activation, prepared: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        weight = prepared
        rows, columns = weight.shape
        compute = torch.float32 if dtype == torch.float16 else dtype
        values, row_scale = x.as_float(compute)
        if _is_nibbles(weight):
            values = torch.cat((values[:, 0::2], values[:, 1::2]), dim=1)
        step = min(
            rows, max(1, (_CPU_BLOCK if values.device.type == "cpu" else _GPU_BLOCK) // columns)
        )
        floats = values.new_empty((step, columns), dtype=torch.float32)
        block = floats if compute == torch.float32 else values.new_empty((step, columns))
        y = values.new_empty((values.shape[0], rows))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            size = part.stop - part.start
            _fill(block[:size], floats[:size], weight, part)
            torch.mm(values, block[:size].t(), out=y[:, part])
        if weight.granularity.kind != "group":
            y = scaled(y, weight.scale.float().reshape(1, -1), widened(y.dtype))
        return scaled(y, row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # x - zero point, the dequantized weight, the product and the scaled product are rounded.
        return 4 * torch.finfo(spec.dtype).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return 0


def _is_nibbles(weight: QuantizedWeight) -> bool:
    """Whether a group's columns are as many even as odd ones, all bytes full."""
    group = weight.granularity.group_size or weight.shape[1]
    return weight.format.bits == 4 and group % 2 == 0


def _fill(block: Tensor, floats: Tensor, weight: QuantizedWeight, rows: slice) -> None:
    """Put rows of the weight into ``block``; without their scale unless it is per group.

    ``floats`` is scratch: torch converts int8 to float32 and multiplies there faster than in
    bfloat16.
    """
    codes = _codes(weight.packed[rows], weight)
    zero_point = weight.zero_point
    if zero_point is not None and weight.granularity.kind != "tensor":
        zero_point = zero_point[rows]
    if weight.granularity.kind != "group":
        block.copy_(codes)
        if zero_point is not None:
            block.sub_(zero_point.to(block.dtype))
        return
    floats.copy_(codes)
    # [n, halves of the bytes, groups, columns of the group in this half]
    halves = 2 if _is_nibbles(weight) else 1
    parts = floats.view(floats.shape[0], halves, weight.scale.shape[1], -1)
    if zero_point is not None:
        parts.sub_(zero_point.float()[:, None, :, None])
    parts.mul_(weight.scale[rows].float()[:, None, :, None])
    if block.dtype != floats.dtype:  # else they are the same memory
        block.copy_(floats)


def _codes(packed: Tensor, weight: QuantizedWeight) -> Tensor:
    """Codes [n, K] (int8), the even columns before the odd ones where they are nibbles."""
    if not _is_nibbles(weight):
        return unpack(packed, weight.shape[1], weight.format)
    return torch.cat((packed & 15, packed >> 4), dim=1).view(torch.int8).sub_(8)
