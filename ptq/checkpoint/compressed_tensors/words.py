"""Codes as 32-bit words, the layout of pack-quantized tensors.

Code j of a row occupies bits j*b to j*b + b - 1 of the row, counted from the low end of the first
word, with the offset 2^(b-1). That is the layout of :mod:`ptq.core.packing` but for two things:
rows end at a multiple of four bytes, and 8-bit codes have the offset too.
"""

import torch
from torch import Tensor

from ptq.core import pack, packed_width, unpack
from ptq.formats import IntFormat

_SIGN = 0x80  # flipped: the offset 128 of an 8-bit code


def word_count(columns: int, bits: int) -> int:
    """Words that a row of ``columns`` codes takes."""
    return -(-columns * bits // 32)


def to_words(packed: Tensor, fmt: IntFormat) -> Tensor:
    """The ``packed`` of a QuantizedWeight, [N, ...] bytes, as int32 [N, word_count(K)]."""
    data = packed.view(torch.uint8)
    if fmt.bits == 8:
        data = data ^ _SIGN
    data = torch.nn.functional.pad(data, (0, -data.shape[1] % 4))
    # by way of one dimension: a single row may have any stride and count as contiguous
    return data.reshape(-1).view(torch.int32).reshape(data.shape[0], data.shape[1] // 4)


def from_words(words: Tensor, columns: int, fmt: IntFormat) -> Tensor:
    """The inverse of :func:`to_words`, for rows of ``columns`` codes."""
    rows, width = words.shape
    data = words.reshape(-1).view(torch.uint8).reshape(rows, 4 * width)
    data = data[:, : packed_width(columns, fmt.bits)]
    if fmt.bits == 8:
        return (data ^ _SIGN).view(torch.int8)
    return data.contiguous()


def zero_points_to_words(zero_point: Tensor, fmt: IntFormat) -> Tensor:
    """Zero points int8 [N, G] as int32 [word_count(N), G]: packed along N."""
    return to_words(pack(zero_point.t().contiguous(), fmt), fmt).t().contiguous()


def zero_points_from_words(words: Tensor, rows: int, fmt: IntFormat) -> Tensor:
    """The inverse of :func:`zero_points_to_words`: int8 [rows, G]."""
    packed = from_words(words.t(), rows, fmt)
    return unpack(packed, rows, fmt).t().contiguous()
