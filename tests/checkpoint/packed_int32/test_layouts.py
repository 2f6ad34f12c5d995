"""The layouts, against their definition in plain Python integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.checkpoint.packed_int32.layouts import (
    codes_from_words,
    codes_to_words,
    zeros_from_words,
    zeros_to_words,
)
from ptq.core import pack
from ptq.errors import UnsupportedError
from ptq.formats import IntFormat
from tests.checkpoint.packed_int32 import by_hand

CASES = [(layout, bits) for layout in ("gptq", "gptq-v2") for bits in (2, 3, 4, 8)] + [("awq", 4)]


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    groups=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_words(case: tuple[str, int], rows: int, columns: int, groups: int, seed: int) -> None:
    layout, bits = case
    fmt, generator = IntFormat(bits, signed=True), torch.Generator().manual_seed(seed)
    rows, columns = 32 * rows, 32 * columns

    def random(low: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, fmt.qmax + 1, shape, generator=generator).to(torch.int8)

    codes = random(fmt.qmin, rows, columns)
    zeros = random(fmt.qmin + (layout == "gptq"), rows, groups)
    middle = 1 << (bits - 1)
    wanted = by_hand.packed(codes.int() + middle, zeros.int() + middle, bits, layout)
    qweight = codes_to_words(pack(codes, fmt), columns, fmt, layout)
    qzeros = zeros_to_words(zeros, fmt, layout)
    assert torch.equal(qweight, wanted["qweight"]) and qweight.dtype == torch.int32
    assert torch.equal(qzeros, wanted["qzeros"]) and qzeros.dtype == torch.int32
    back = codes_from_words(qweight, (rows, columns), layout, bits)
    assert torch.equal(back, pack(codes, fmt)) and back.dtype == pack(codes, fmt).dtype
    assert torch.equal(zeros_from_words(qzeros, rows, layout, bits), zeros)


def test_symmetric_zero_points_are_the_known_words() -> None:
    """0x77777777 is what every symmetric 4-bit checkpoint of version 1 holds."""
    zeros = torch.zeros(8, 1, dtype=torch.int8)
    fmt = IntFormat(4, signed=True)
    for layout, word in (("gptq", 0x77777777), ("gptq-v2", -0x77777778), ("awq", -0x77777778)):
        assert zeros_to_words(zeros, fmt, layout).tolist() == [[word]]
    eight = zeros_to_words(zeros, IntFormat(8, signed=True), "gptq")
    assert eight.tolist() == [[0x7F7F7F7F] * 2]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_stored_zero_point_of_version_1(bits: int) -> None:
    values = [3] * 32
    values[5] = (1 << bits) - 1
    words = torch.tensor([by_hand.words(values, bits)], dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=f"qzeros holds {(1 << bits) - 1}, .*gptq_v2"):
        zeros_from_words(words, 32, "gptq", bits)
    assert by_hand.values(words[0].tolist(), 32, bits) == values
    assert zeros_from_words(words, 32, "gptq-v2", bits)[5, 0] == (1 << (bits - 1)) - 1
