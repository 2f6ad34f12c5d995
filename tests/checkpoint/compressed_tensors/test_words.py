"""The packed layout, against its definition in plain Python integers."""

import pytest
import torch

from ptq.checkpoint.compressed_tensors.words import (
    from_words,
    to_words,
    word_count,
    zero_points_from_words,
    zero_points_to_words,
)
from ptq.core import pack, unpack
from ptq.formats import IntFormat


def by_definition(codes: list[int], bits: int) -> list[int]:
    """The words of one row: code j at the bits from j * bits, with the offset 2^(bits - 1)."""
    number = sum((code + (1 << (bits - 1))) << (bits * j) for j, code in enumerate(codes))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 40), (4, 7), (2, 65)])
def test_words(bits: int, rows: int, columns: int) -> None:
    fmt = IntFormat(bits, signed=True)
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, (rows, columns)).to(torch.int8)
    words = to_words(pack(codes, fmt), fmt)
    assert words.dtype == torch.int32
    assert words.shape == (rows, word_count(columns, bits))
    assert words.tolist() == [by_definition(row, bits) for row in codes.tolist()]
    packed = from_words(words, columns, fmt)
    assert torch.equal(packed, pack(codes, fmt))
    assert torch.equal(unpack(packed, columns, fmt), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "groups"), [(32, 1), (8, 5), (13, 2)])
def test_zero_points_are_packed_along_the_rows(bits: int, rows: int, groups: int) -> None:
    fmt = IntFormat(bits, signed=True)
    zero_point = torch.randint(fmt.qmin, fmt.qmax + 1, (rows, groups)).to(torch.int8)
    words = zero_points_to_words(zero_point, fmt)
    assert words.shape == (word_count(rows, bits), groups)
    assert words.t().tolist() == [by_definition(column, bits) for column in zero_point.t().tolist()]
    assert torch.equal(zero_points_from_words(words, rows, fmt), zero_point)
