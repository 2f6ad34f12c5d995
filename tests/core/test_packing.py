"""The byte layout of packed codes, against numpy's bits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.core import pack, packed_width, unpack
from ptq.core import packing as packing_module
from ptq.formats import INTEGERS, IntFormat

formats = st.sampled_from(list(INTEGERS.values()))


def codes(rows: int, columns: int, fmt: IntFormat, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(fmt.qmin, fmt.qmax + 1, (rows, columns), generator=generator).to(fmt.dtype)


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), fmt=formats, seed=st.integers(0, 99))
def test_round_trip(rows: int, columns: int, fmt: IntFormat, seed: int) -> None:
    x = codes(rows, columns, fmt, seed)
    packed = pack(x, fmt)
    if fmt.bits < 8:
        assert packed.dtype == torch.uint8
        assert packed.shape == (rows, packed_width(columns, fmt.bits))
    back = unpack(packed, columns, fmt)
    assert back.dtype == fmt.dtype
    assert torch.equal(back, x)


@settings(max_examples=100, deadline=None)
@given(columns=st.integers(1, 70), fmt=formats, seed=st.integers(0, 99))
def test_layout_is_a_little_endian_bit_stream(columns: int, fmt: IntFormat, seed: int) -> None:
    """Each code, offset so that it is not negative, as its bits from the low end, one after
    another; numpy packs the stream."""
    if fmt.bits == 8:
        return
    x = codes(2, columns, fmt, seed)
    stored = x.numpy().astype(np.int64) - fmt.qmin
    bits = (stored[:, :, None] >> np.arange(fmt.bits)) & 1
    expected = np.packbits(bits.reshape(2, -1).astype(np.uint8), axis=1, bitorder="little")
    assert np.array_equal(pack(x, fmt).numpy(), expected)


def test_nibbles_by_hand() -> None:
    x = torch.tensor([[-8, 7, 0]], dtype=torch.int8)
    assert pack(x, INTEGERS["int4"]).tolist() == [[0xF0, 0x08]]


def test_rows_in_pieces_are_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = INTEGERS["int3"]
    x = codes(50, 33, fmt)
    whole = pack(x, fmt)
    monkeypatch.setattr(packing_module, "_ROWS_AT_ONCE", 100)
    assert torch.equal(pack(x, fmt), whole)
    assert torch.equal(unpack(whole, 33, fmt), x)


def test_eight_bits_are_not_copied() -> None:
    x = codes(3, 5, INTEGERS["int8"])
    assert pack(x, INTEGERS["int8"]) is x
    assert unpack(x, 5, INTEGERS["int8"]) is x
