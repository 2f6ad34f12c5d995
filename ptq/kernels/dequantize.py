"""Dequantize a block of rows that fits in cache, multiply, go on: good from some dozen rows up.

The float copy of the weight never exists as a whole, and every block is made in the same buffers.
Scales per channel are applied to the product instead of the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight, unpack
from ptq.kernels.activations import Activation, scaled, widened
from ptq.kernels.cuda_triton import TritonWeight, unreadable
from ptq.kernels.nibbles import has_op, is_nibbles, nibble_rows, nibbles_in_float
from ptq.kernels.spec import LinearSpec
from ptq.kernels.triton_launch import dequantize_into, dequantize_into_op

_CPU_BLOCK = 1 << 20  # weights at a time: in the last-level cache
_CPU_BYTES_BLOCK = 1 << 21  # of codes that are converted in one pass
_UNPACKED = 1 << 19  # of nibbles in float32 at a time
_GPU_BLOCK = 1 << 26  # the launches cost more than the memory


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; without them float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(device: str, dtype: torch.dtype, bits: int) -> torch.dtype:
    """What to multiply in, for activations of this dtype and codes of so many bits.

    float32 for float16, whose unscaled products could overflow. bfloat16 for float32 where the
    processor is several times faster in it and the weights have up to 4 bits: rounding them moves
    them by a thirtieth of what quantizing did. Not in compiled graphs: inductor does not vectorize
    code that mixes bfloat16 with scales in float16.
    """
    if dtype == torch.float16:
        return torch.float32
    if torch.compiler.is_compiling():
        return dtype
    if dtype == torch.float32 and device == "cpu" and bits <= 4 and multiplies_bfloat16():
        return torch.bfloat16
    return dtype


@dataclass(frozen=True)
class DequantizeBlocks:
    """Serves every spec, in the dtype of :func:`compute_dtype`."""

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
        device = x.values.device.type
        values, row_scale = x.as_float(compute_dtype(device, dtype, weight.format.bits))
        step = max(1, _block_size(weight, device) // weight.shape[1])
        if device == "cuda" and unreadable(weight.format, weight.shape[1]) is None:
            y = multiply_blocks(values, weight.shape[0], step, _one_pass(weight), None)
            return scaled(y, row_scale, dtype)
        scale = None
        if weight.granularity.kind != "group":
            scale = weight.scale.float().reshape(1, -1)
        y = multiply_blocks(values, weight.shape[0], step, _filler(weight, values), scale)
        return scaled(y, row_scale, dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        # x - zero point, the dequantized weight, the product and the scaled product are rounded.
        compute = compute_dtype(spec.device, spec.dtype, spec.format.bits)
        return 4 * torch.finfo(compute).eps

    def extra_bytes(self, spec: LinearSpec) -> int:
        return 0


def multiply_blocks(
    x: Tensor, rows: int, step: int, fill: Callable[[slice, Tensor], None], scale: Tensor | None
) -> Tensor:
    """``x W^T`` [M, rows] in the dtype of x [M, K], by blocks of W.

    Args:
        step: rows of a block.
        fill: puts these rows of W into a block [n, K].
        scale: float32 [1, rows] of W's rows or [1, 1], still to be applied; None for none.
    """
    step = min(rows, step)
    block = x.new_empty((step, x.shape[1]))
    y = x.new_empty((x.shape[0], rows))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        size = part.stop - part.start
        fill(part, block[:size])
        if scale is None and torch.compiler.is_compiling():  # which takes whole tensors as ``out``
            y[:, part] = torch.mm(x, block[:size].t())
        elif scale is None:
            torch.mm(x, block[:size].t(), out=y[:, part])
        else:
            product = torch.mm(x, block[:size].t()).to(widened(x.dtype))
            y[:, part] = product.mul_(scale if scale.numel() == 1 else scale[:, part])
    return y


def _block_size(weight: QuantizedWeight, device: str) -> int:
    if device != "cpu":
        return _GPU_BLOCK
    return _CPU_BYTES_BLOCK if weight.format.bits == 8 else _CPU_BLOCK


def _one_pass(weight: QuantizedWeight) -> Callable[[slice, Tensor], None]:
    """What makes a block of the weight on a GPU, scaled."""
    w = TritonWeight.of(weight, sums=False)

    def fill(part: slice, block: Tensor) -> None:
        call = dequantize_into_op if torch.compiler.is_compiling() else dequantize_into
        zero_point = None if w.zero_point is None else w.zero_point[part]
        call(block, w.codes[part], w.scale[part], zero_point, w.group, w.packed)

    return fill


def _filler(weight: QuantizedWeight, x: Tensor) -> Callable[[slice, Tensor], None]:
    """What makes a block of the weight; without its scale unless it is per group."""
    if x.device.type == "cpu" and is_nibbles(weight) and has_op():
        some = max(1, _UNPACKED // weight.shape[1])
        rows = nibble_rows(min(some, weight.shape[0]), weight.shape[1])

        def fill(part: slice, block: Tensor) -> None:
            for start in range(part.start, part.stop, some):
                piece = slice(start, min(start + some, part.stop))
                into = block[start - part.start : piece.stop - part.start]
                _fill(into, nibbles_in_float(weight.packed[piece], rows), weight, piece)

        return fill
    return lambda part, block: _fill(
        block, unpack(weight.packed[part], weight.shape[1], weight.format), weight, part
    )


def _fill(block: Tensor, codes: Tensor, weight: QuantizedWeight, rows: slice) -> None:
    """Put these codes [n, K] of rows of the weight into ``block``.

    Groups are scaled in float32: torch converts int8 to it and multiplies in it faster than in
    bfloat16.
    """
    zero_point = weight.zero_point
    if zero_point is not None and weight.granularity.kind != "tensor":
        zero_point = zero_point[rows]
    if weight.granularity.kind != "group":
        block.copy_(codes)
        if zero_point is not None:
            block.sub_(zero_point.to(block.dtype))
        return
    groups = codes.float().view(codes.shape[0], weight.scale.shape[1], -1)
    if zero_point is not None:
        groups.sub_(zero_point.float()[:, :, None])
    groups.mul_(weight.scale[rows].float()[:, :, None])
    block.copy_(groups.view_as(block))
