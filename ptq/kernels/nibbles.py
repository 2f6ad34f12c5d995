"""Nibbles to float32 by torch's op for 4-bit embedding tables, the fastest that it has on a CPU.

``quantized::embedding_bag_4bit_unpack`` takes rows of K / 2 bytes, the low nibble first, and a
scale and a bias in float16 behind them: ``w = u * scale + bias``. 16.8 million weights take 0.9 ms
on two cores of a Zen 4; the same by shifts, masks and conversions 3.3 ms.
"""

import torch
from torch import Tensor

from ptq.core import QuantizedWeight

TAIL = 4
"""Bytes behind the nibbles of a row."""


def has_op() -> bool:
    """Whether this build of torch has the op, which is on its way out (pytorch/ao#2259)."""
    return hasattr(torch.ops.quantized, "embedding_bag_4bit_unpack")


def is_nibbles(weight: QuantizedWeight) -> bool:
    """Whether the codes are two to a byte, all bytes full."""
    return weight.format.bits == 4 and weight.shape[1] % 2 == 0


def nibble_rows(rows: int, columns: int) -> Tensor:
    """A buffer uint8 [rows, columns / 2 + 4] for :func:`nibbles_in_float`."""
    buffer = torch.empty((rows, columns // 2 + TAIL), dtype=torch.uint8)
    buffer[:, -TAIL:] = torch.tensor([1.0, -8.0], dtype=torch.float16).view(torch.uint8)
    return buffer


def nibbles_in_float(packed: Tensor, buffer: Tensor) -> Tensor:
    """Codes -8..7 as float32 [n, K] of the packed ones [n, K / 2].

    Args:
        buffer: of :func:`nibble_rows`; at least n rows, which are overwritten.
    """
    rows = buffer[: packed.shape[0]]
    rows[:, :-TAIL] = packed
    return unpacked(rows)


def unpacked(rows: Tensor) -> Tensor:
    """float32 [n, K] of rows uint8 [n, K / 2 + 4] in the op's layout."""
    values: Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(rows)
    return values
