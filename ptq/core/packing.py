"""k-bit codes to bytes and back.

The layout is little-endian along the last dimension: code j occupies the bits j*k to j*k + k - 1
of the row, counted from the low end of the first byte. For 4 bits this is the usual nibble order,
even columns in the low half. Signed codes are stored with the offset 2^(k-1), so the stored
value is never negative. 8-bit codes are not packed: they are stored as they are, floating-point
ones as int8 bytes.
"""

import torch
from torch import Tensor

from ptq.formats import FloatFormat, Format, IntFormat

_ROWS_AT_ONCE = 1 << 22  # codes that are widened to int64 at a time


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of ``columns`` codes takes."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """Codes [R, C] in ``fmt.dtype`` to bytes [R, packed_width(C)] (uint8; 8 bits: unchanged)."""
    if isinstance(fmt, FloatFormat):
        return codes.view(torch.int8)
    if fmt.bits == 8:
        return codes
    if 8 % fmt.bits == 0:
        return _pack_shifts(codes, fmt)
    return _by_rows(codes, packed_width(codes.shape[1], fmt.bits), torch.uint8, fmt, _pack_words)


def unpack(packed: Tensor, columns: int, fmt: Format) -> Tensor:
    """The inverse of :func:`pack`: codes [R, columns] in ``fmt.dtype``."""
    if isinstance(fmt, FloatFormat):
        return packed.view(fmt.dtype)
    if fmt.bits == 8:
        return packed
    if 8 % fmt.bits == 0:
        return _unpack_shifts(packed, columns, fmt)
    return _by_rows(packed, columns, fmt.dtype, fmt, _unpack_words)


def _offset(fmt: IntFormat) -> int:
    return -fmt.qmin


def _pack_shifts(codes: Tensor, fmt: IntFormat) -> Tensor:
    """Formats that divide a byte: 2 and 4 bits."""
    per_byte = 8 // fmt.bits
    stored = (codes + _offset(fmt)).to(torch.uint8)
    stored = torch.nn.functional.pad(stored, (0, -codes.shape[1] % per_byte))
    packed = stored[:, 0::per_byte].clone()
    for i in range(1, per_byte):
        packed |= stored[:, i::per_byte] << (i * fmt.bits)
    return packed


def _unpack_shifts(packed: Tensor, columns: int, fmt: IntFormat) -> Tensor:
    per_byte, mask = 8 // fmt.bits, (1 << fmt.bits) - 1
    codes = packed.new_empty(packed.shape[0], packed.shape[1] * per_byte, dtype=fmt.dtype)
    for i in range(per_byte):
        stored = (packed >> (i * fmt.bits)) & mask
        codes[:, i::per_byte] = stored.to(fmt.dtype) - _offset(fmt)
    return codes[:, :columns].contiguous() if codes.shape[1] != columns else codes


def _by_rows(x: Tensor, width: int, dtype: torch.dtype, fmt: IntFormat, convert: object) -> Tensor:
    """Apply ``convert`` to a bounded number of rows at a time: int64 words cost eight bytes."""
    assert callable(convert)
    out = torch.empty(x.shape[0], width, dtype=dtype, device=x.device)
    step = max(1, _ROWS_AT_ONCE // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        out[start : start + step] = convert(x[start : start + step], width, fmt)
    return out


def _pack_words(codes: Tensor, width: int, fmt: IntFormat) -> Tensor:
    """Eight codes make one word of ``bits`` bytes."""
    bits = fmt.bits
    stored = codes.to(torch.int64) + _offset(fmt)
    stored = torch.nn.functional.pad(stored, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    shifts = torch.arange(8, device=codes.device) * bits
    words = (stored << shifts).sum(-1, keepdim=True)
    byte_shifts = torch.arange(bits, device=codes.device) * 8
    return ((words >> byte_shifts) & 0xFF).to(torch.uint8).flatten(1)[:, :width]


def _unpack_words(packed: Tensor, columns: int, fmt: IntFormat) -> Tensor:
    bits = fmt.bits
    padded = torch.nn.functional.pad(packed.to(torch.int64), (0, -packed.shape[1] % bits))
    byte_shifts = torch.arange(bits, device=packed.device) * 8
    words = (padded.view(len(packed), -1, bits) << byte_shifts).sum(-1, keepdim=True)
    shifts = torch.arange(8, device=packed.device) * bits
    stored = (words >> shifts) & ((1 << bits) - 1)
    return (stored.flatten(1)[:, :columns] - _offset(fmt)).to(fmt.dtype)
