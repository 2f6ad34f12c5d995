"""Launching Triton's programs: plain functions, and ops of the same for compiled graphs.

A compiler takes an op for one operation, so a product that several layers ask for is computed once.
The tiles are those that were fastest on an H200 (576 to 14336 outputs), and fit a GPU with 99 KB of
shared memory for a block.
"""

import torch
from torch import Tensor

from ptq.kernels.triton_ready import on_device_of

_FEW = 32  # rows up to which tiles of 16 rows are fastest
_NARROW = 1024  # outputs below which larger tiles leave a GPU idle
_WIDE_TILES = 100  # this many tiles of 128 x 128 fill a GPU


def float_linear(
    x: Tensor,
    x_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group: int,
    packed: bool,
) -> Tensor:
    """y [M, N] in the dtype of x for bfloat16 or float16 x [M, K]; the codes become float.

    Args:
        x_scale: float32 [M, 1] or [1, 1], of the rows of x, or None.
        codes: int8 [N, K], or nibbles uint8 [N, K / 2] (packed).
        scale, zero_point: [N, groups]; the zero point is int8 or None.
        group: the group size, 0 for one scale a row.
    """
    from ptq.kernels import triton_programs as programs

    m, k = x.shape
    n, groups = scale.shape
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    scales = x if x_scale is None else x_scale
    zeros = codes if zero_point is None else zero_point
    flags = {
        "PACKED": packed,
        "GROUP": group,
        "ZERO": zero_point is not None,
        "X_SCALE": x_scale is not None,
    }
    with on_device_of(x):
        if m == 1:
            bn, bk = _row_tiles(n)
            programs.float_row[(-(-n // bn),)](
                x, scales, codes, scale, zeros, y, n, k, groups,
                BN=bn, BK=bk, num_warps=4, **flags,
            )  # fmt: skip
        else:
            bm, bn, bk, stages = _float_tiles(m, n, group)
            programs.float_rows[(-(-n // bn), -(-m // bm))](
                x, scales, codes, scale, zeros, y, m, n, k, groups, _by_row(x_scale),
                BM=bm, BN=bn, BK=bk, num_warps=4, num_stages=stages, **flags,
            )  # fmt: skip
    return y


def integer_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    row_sum: Tensor,
    packed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, N] in ``dtype`` for int8 codes x [M, K]: exact in int32, then scaled in float32.

    Args:
        x_scale, x_zero_point: float32 and int32, [M, 1] or [1, 1]; the zero point may be None.
        codes, scale, zero_point: as in :func:`float_linear`, with one scale a row.
        row_sum: int32 [N], of the codes.
    """
    from ptq.kernels import triton_programs as programs

    m, k = x.shape
    n = scale.shape[0]
    y = torch.empty((m, n), dtype=dtype, device=x.device)
    x_zeros = x if x_zero_point is None else x_zero_point
    zeros = codes if zero_point is None else zero_point
    flags = {
        "PACKED": packed,
        "ZERO": zero_point is not None,
        "X_ZERO": x_zero_point is not None,
    }
    with on_device_of(x):
        if m == 1:
            bn, bk = _row_tiles(n)
            programs.integer_row[(-(-n // bn),)](
                x, x_scale, x_zeros, codes, scale, zeros, y, n, k,
                BN=bn, BK=bk, num_warps=4, **flags,
            )  # fmt: skip
        else:
            bm, bn, bk, warps, stages = _integer_tiles(m, n)
            programs.integer_rows[(-(-n // bn), -(-m // bm))](
                x, x_scale, x_zeros, codes, scale, zeros, row_sum, y, m, n, k, _by_row(x_scale),
                BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages, **flags,
            )  # fmt: skip
    return y


def dequantize_into(
    block: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group: int,
    packed: bool,
) -> None:
    """The float weight into ``block`` [N, K], in its dtype; the rest as in :func:`float_linear`."""
    from ptq.kernels import triton_programs as programs

    n, k = block.shape
    with on_device_of(block):
        programs.dequantize[(-(-n // 4), -(-k // 512))](
            codes, scale, codes if zero_point is None else zero_point, block, n, k, scale.shape[1],
            PACKED=packed, GROUP=group, ZERO=zero_point is not None, BN=4, BK=512, num_warps=4,
        )  # fmt: skip


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of contiguous x [M, K] in ``dtype``, and their scale [M, 1]."""
    from ptq.kernels import triton_programs as programs

    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((x.shape[0], 1), device=x.device)
    with on_device_of(x):
        programs.quantize_rows[(x.shape[0],)](
            x, codes, scale, x.shape[1], BLOCK=2048, num_warps=4
        )  # fmt: skip
    return codes, scale


def _by_row(x_scale: Tensor | None) -> int:
    """The programs' ``x_step``: whether each row of x has a scale of its own."""
    return int(x_scale is not None and x_scale.shape[0] > 1)


def _row_tiles(n: int) -> tuple[int, int]:
    """Outputs and columns of a tile, for one row of x."""
    return (2, 2048) if n < _NARROW else (4, 1024)


def _float_tiles(m: int, n: int, group: int) -> tuple[int, int, int, int]:
    """Rows of x, outputs and columns of a tile, and stages."""
    if m > _FEW:
        return (64, 64, 128, 3) if group <= 128 else (64, 64, 256, 2)
    if group:
        return 16, 64 if n >= _NARROW and group >= 32 else 32, 256, 4
    return 16, 16 if n <= 2 * _NARROW else 32, 256, 5


def _integer_tiles(m: int, n: int) -> tuple[int, int, int, int, int]:
    """Rows of x, outputs and columns of a tile, warps and stages."""
    if m <= _FEW:
        return 16, 32, 256, 4, 5
    if -(-m // 128) * -(-n // 128) >= _WIDE_TILES:
        return 128, 128, 128, 8, 3
    return 64, 64, 128, 4, 4


float_linear_op = torch.library.custom_op("ptq::triton_float_linear", float_linear, mutates_args=())
integer_linear_op = torch.library.custom_op(
    "ptq::triton_integer_linear", integer_linear, mutates_args=()
)
dequantize_into_op = torch.library.custom_op(
    "ptq::triton_dequantize_into", dequantize_into, mutates_args=("block",)
)


float_linear_op.register_fake(
    lambda x, _x_scale, _codes, scale, *_: x.new_empty((x.shape[0], scale.shape[0]))
)
integer_linear_op.register_fake(
    lambda x, _x_scale, _x_zero_point, _codes, scale, *rest: x.new_empty(
        (x.shape[0], scale.shape[0]), dtype=rest[-1]
    )
)
