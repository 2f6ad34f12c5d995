"""Triton programs over the canonical codes: one launch for what torch does in a dozen.

Triton comes with torch's CUDA builds for Linux; this module needs it. ``PACKED`` codes are nibbles,
even columns in the low half, with an offset of 8 (:mod:`ptq.core.packing`). ``GROUP`` is the group
size, 0 for one scale a row.
"""

import triton
import triton.language as tl

_MAGIC = tl.constexpr(0x4B000000)  # 2^23 as float32: a whole number below it, or-ed in, adds up


@triton.jit
def _codes(byte, PACKED: tl.constexpr):
    """Codes of bytes: of the nibble in the low half (PACKED), else int8."""
    return (byte & 15).to(tl.int8) - 8 if PACKED else byte


@triton.jit
def _codes_in_float(byte, PACKED: tl.constexpr):
    """float32 codes of bytes, without the units that convert integers, of which a GPU has few."""
    if PACKED:
        stored = (byte & 15).to(tl.int32)
        offset = 8388616.0  # 2^23 + 8
    else:
        stored = (byte.to(tl.int32) & 255) ^ 128
        offset = 8388736.0  # 2^23 + 128
    return (stored | _MAGIC).to(tl.float32, bitcast=True) - offset


@triton.jit
def quantize_rows(x, codes, scale, columns, BLOCK: tl.constexpr):
    """Symmetric int8 codes of each row of x, and ``max|x| / 127``; NaN makes the scale NaN."""
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    codes += row * columns
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        value = tl.abs(tl.load(x + start + offsets, start + offsets < columns, 0.0).to(tl.float32))
        largest = tl.where((value > largest) | (value != value), value, largest)
    nan = tl.max((largest != largest).to(tl.int32), 0) > 0
    step = tl.maximum(tl.div_rn(tl.max(largest, 0), 127.0), 1.1754943508222875e-38)
    step = tl.where(nan, float("nan"), step)
    tl.store(scale + row, step)
    for start in range(0, columns, BLOCK):
        inside = start + offsets < columns
        value = tl.div_rn(tl.load(x + start + offsets, inside, 0.0).to(tl.float32), step)
        rounded = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest, ties to even
        tl.store(codes + start + offsets, rounded.to(codes.dtype.element_ty), inside)


@triton.jit
def dequantize(
    codes, scale, zero, out, rows, columns, groups,
    PACKED: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The float weight [rows, columns], from codes that lie side by side."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    wide = n.to(tl.int64)[:, None]
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    if PACKED:
        half = tl.program_id(1) * (BK // 2) + tl.arange(0, BK // 2)
        there = (n < rows)[:, None] & (half < columns // 2)[None, :]
        byte = tl.load(codes + wide * (columns // 2) + half[None, :], there, 0)
        value = _codes(tl.interleave(byte, byte >> 4), PACKED).to(tl.float32)
    else:
        value = tl.load(codes + wide * columns + k[None, :], inside, 0).to(tl.float32)
    place = wide + tl.zeros((1, BK), tl.int64)
    if GROUP:
        place = wide * groups + (k // GROUP)[None, :]
    if ZERO:
        value -= tl.load(zero + place, inside, 0).to(tl.float32)
    step = tl.load(scale + place, inside, 0.0).to(tl.float32)
    tl.store(out + wide * columns + k[None, :], (value * step).to(out.dtype.element_ty), inside)


@triton.jit
def _products(byte, x, step, point, PACKED: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr):
    """float32 [BN, width]: ``(code - point) * x``, times the step of a group if there are some."""
    value = _codes(byte, PACKED).to(tl.float32)
    if GROUP:
        BN: tl.constexpr = byte.shape[0]
        width: tl.constexpr = byte.shape[1]
        groups: tl.constexpr = step.shape[1]
        value = value.reshape(BN, groups, width // groups)
        if ZERO:
            value -= point[:, :, None]
        product = (value * step[:, :, None]).reshape(BN, width) * x[None, :]
    else:
        if ZERO:
            value -= point[:, None]
        product = value * x[None, :]
    return product


@triton.jit
def float_row(
    x, x_scale, codes, scale, zero, y, rows, columns, groups,
    PACKED: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, X_SCALE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [rows] = W x for one float x [columns]; a group size divides BK."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    wide = n.to(tl.int64)[:, None]
    some = (n < rows)[:, None]
    width: tl.constexpr = BK // 2 if PACKED else BK
    total = tl.zeros((BN, width), tl.float32)
    if GROUP:
        step = tl.zeros((BN, BK // GROUP), tl.float32)
        point = tl.zeros((BN, BK // GROUP), tl.float32)
    else:
        step = tl.load(scale + n, n < rows, 0.0).to(tl.float32)
        point = tl.zeros((BN,), tl.float32)
        if ZERO:
            point = tl.load(zero + n, n < rows, 0).to(tl.float32)
    for start in range(0, columns, BK):
        if GROUP:
            g = start // GROUP + tl.arange(0, BK // GROUP)
            known = some & (g < groups)[None, :]
            step = tl.load(scale + wide * groups + g[None, :], known, 0.0).to(tl.float32)
            if ZERO:
                point = tl.load(zero + wide * groups + g[None, :], known, 0).to(tl.float32)
        at = start // (BK // width) + tl.arange(0, width)
        inside = at < columns // (BK // width)
        bytes_ = tl.load(
            codes + wide * (columns // (BK // width)) + at[None, :], some & inside[None, :], 0
        )
        if PACKED:
            even = tl.load(x + 2 * at, inside, 0).to(tl.float32)
            odd = tl.load(x + 2 * at + 1, inside, 0).to(tl.float32)
            total += _products(bytes_, even, step, point, PACKED, GROUP, ZERO)
            total += _products(bytes_ >> 4, odd, step, point, PACKED, GROUP, ZERO)
        else:
            value = tl.load(x + at, inside, 0).to(tl.float32)
            total += _products(bytes_, value, step, point, PACKED, GROUP, ZERO)
    result = tl.sum(total, 1)
    if not GROUP:
        result *= step
    if X_SCALE:
        result *= tl.load(x_scale)
    tl.store(y + n, result.to(y.dtype.element_ty), n < rows)


@triton.jit
def float_rows(
    x, x_scale, codes, scale, zero, y, m_rows, rows, columns, groups, x_step,
    PACKED: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, X_SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [m_rows, rows] = x W^T, the weight made float on its way; a group size divides BK.

    ``x_step``: 1 where each row of x has a scale of its own, 0 for one of all.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    wide = n.to(tl.int64)[:, None]
    long = m.to(tl.int64)[None, :]
    some = (n < rows)[:, None]
    few = (m < m_rows)[None, :]
    total = tl.zeros((BN, BM), tl.float32)
    if ZERO and not GROUP:
        point = tl.load(zero + n, n < rows, 0).to(tl.float32)
    for start in range(0, columns, BK):
        k = start + tl.arange(0, BK)
        if PACKED:
            half = start // 2 + tl.arange(0, BK // 2)
            there = some & (half < columns // 2)[None, :]
            byte = tl.load(codes + wide * (columns // 2) + half[None, :], there, 0)
            byte = tl.interleave(byte, byte >> 4)
        else:
            there = some & (k < columns)[None, :]
            byte = tl.load(codes + wide * columns + k[None, :], there, 0)
        if GROUP:
            value = _codes_in_float(byte, PACKED)
            g = start // GROUP + tl.arange(0, BK // GROUP)
            known = some & (g < groups)[None, :]
            step = tl.load(scale + wide * groups + g[None, :], known, 0.0).to(tl.float32)
            value = value.reshape(BN, BK // GROUP, GROUP)
            if ZERO:
                points = tl.load(zero + wide * groups + g[None, :], known, 0).to(tl.float32)
                value -= points[:, :, None]
            value = (value * step[:, :, None]).reshape(BN, BK)
        else:
            value = _codes(byte, PACKED).to(tl.float32)
            if ZERO:
                value -= point[:, None]
        each = tl.load(x + long * columns + k[:, None], few & (k < columns)[:, None], 0)
        total = tl.dot(value.to(x.dtype.element_ty), each, total)
    if not GROUP:
        total *= tl.load(scale + n, n < rows, 0.0).to(tl.float32)[:, None]
    if X_SCALE:
        total *= tl.load(x_scale + m * x_step, m < m_rows, 0.0)[None, :]
    tl.store(y + long * rows + wide, total.to(y.dtype.element_ty), some & few)


@triton.jit
def integer_row(
    x, x_scale, x_zero, codes, scale, zero, y, rows, columns,
    PACKED: tl.constexpr, ZERO: tl.constexpr, X_ZERO: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [rows] = W x for int8 codes x [columns], exactly until the scales are applied."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    wide = n.to(tl.int64)[:, None]
    some = (n < rows)[:, None]
    per_byte: tl.constexpr = 2 if PACKED else 1
    width: tl.constexpr = BK // per_byte
    total = tl.zeros((BN, width), tl.int32)
    point = tl.zeros((BN,), tl.int32)
    if ZERO:
        point = tl.load(zero + n, n < rows, 0).to(tl.int32)
    x_point = 0
    if X_ZERO:
        x_point = tl.load(x_zero)
    for start in range(0, columns, BK):
        at = start // per_byte + tl.arange(0, width)
        inside = at < columns // per_byte
        place = codes + wide * (columns // per_byte) + at[None, :]
        byte = tl.load(place, some & inside[None, :], 0)
        if PACKED:
            even = tl.where(inside, tl.load(x + 2 * at, inside, 0).to(tl.int32) - x_point, 0)
            odd = tl.where(inside, tl.load(x + 2 * at + 1, inside, 0).to(tl.int32) - x_point, 0)
            total += ((byte & 15).to(tl.int32) - 8 - point[:, None]) * even[None, :]
            total += ((byte >> 4).to(tl.int32) - 8 - point[:, None]) * odd[None, :]
        else:
            value = tl.where(inside, tl.load(x + at, inside, 0).to(tl.int32) - x_point, 0)
            total += (byte.to(tl.int32) - point[:, None]) * value[None, :]
    step = tl.load(scale + n, n < rows, 0.0).to(tl.float32)
    result = tl.sum(total, 1).to(tl.float32) * tl.load(x_scale) * step
    tl.store(y + n, result.to(y.dtype.element_ty), n < rows)


@triton.jit
def integer_rows(
    x, x_scale, x_zero, codes, scale, zero, row_sum, y, m_rows, rows, columns, x_step,
    PACKED: tl.constexpr, ZERO: tl.constexpr, X_ZERO: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [m_rows, rows] = x W^T for int8 codes x, exactly until the scales are applied.

    ``x_step``: 1 where each row of x has a scale and zero point of its own, 0 for one of all.
    ``sum (x - zx)(w - zw) = sum x w - zx sum w - zw (sum x - K zx)``.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    wide = n.to(tl.int64)[:, None]
    long = m.to(tl.int64)[None, :]
    some = (n < rows)[:, None]
    few = (m < m_rows)[None, :]
    total = tl.zeros((BN, BM), tl.int32)
    x_sum = tl.zeros((BM,), tl.int32)
    for start in range(0, columns, BK):
        k = start + tl.arange(0, BK)
        if PACKED:
            half = start // 2 + tl.arange(0, BK // 2)
            there = some & (half < columns // 2)[None, :]
            byte = tl.load(codes + wide * (columns // 2) + half[None, :], there, 0)
            value = tl.interleave(byte & 15, byte >> 4).to(tl.int8) - 8
        else:
            there = some & (k < columns)[None, :]
            value = tl.load(codes + wide * columns + k[None, :], there, 0)
        each = tl.load(x + long * columns + k[:, None], few & (k < columns)[:, None], 0)
        if ZERO:
            x_sum += tl.sum(each.to(tl.int32), 0)
        total = tl.dot(value, each, total, out_dtype=tl.int32)
    if X_ZERO:
        x_point = tl.load(x_zero + m * x_step, m < m_rows, 0)
        total -= tl.load(row_sum + n, n < rows, 0)[:, None] * x_point[None, :]
        x_sum -= columns * x_point
    if ZERO:
        total -= tl.load(zero + n, n < rows, 0).to(tl.int32)[:, None] * x_sum[None, :]
    result = total.to(tl.float32) * tl.load(x_scale + m * x_step, m < m_rows, 0.0)[None, :]
    result *= tl.load(scale + n, n < rows, 0.0).to(tl.float32)[:, None]
    tl.store(y + long * rows + wide, result.to(y.dtype.element_ty), some & few)
