"""Codes of keys and values: error, size, and that pieces are what the whole would be."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.errors import UnsupportedError
from ptq.kv_cache.states import QuantizedStates, StateFormat

FORMATS = [
    StateFormat(bits, tokens, channels, symmetric, scale_dtype)
    for bits, (tokens, channels), symmetric, scale_dtype in product(
        (4, 8),
        ((1, None), (1, 4), (8, 1)),
        (True, False),
        (torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32),
    )
]
GROWTH = {torch.float8_e5m2: 2**-2, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""By how much a number grows at most when it is rounded up to the dtype."""


def states(seed: int, spread: float, offset: float, length: int = 16, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, length, width, generator=generator)
    return x * spread + offset * torch.randn(1, 3, 1, width, generator=generator)


def groups(fmt: StateFormat, shape: torch.Size) -> Iterator[tuple[tuple[slice, ...], tuple]]:
    """Where the elements of each group are, and where their scale is."""
    channels = fmt.channels or shape[3]
    for b, h, t, d in product(
        range(shape[0]), range(shape[1]), range(shape[2] // fmt.tokens), range(shape[3] // channels)
    ):
        place = (
            slice(b, b + 1), slice(h, h + 1),
            slice(t * fmt.tokens, (t + 1) * fmt.tokens), slice(d * channels, (d + 1) * channels),
        )  # fmt: skip
        yield place, (b, h, t, 0, d, 0)


@settings(max_examples=60, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1.0, 50.0]),
)
def test_error_is_half_a_step_and_steps_are_no_larger_than_the_range_needs(
    fmt: StateFormat, seed: int, spread: float, offset: float
) -> None:
    x = states(seed, spread, offset)
    stored = fmt.quantize(x)
    read = stored.dequantize(torch.float32)
    smallest = 2**-13  # of the scales' dtypes, with room
    for place, index in groups(fmt, x.shape):
        part, step = x[place].double(), stored.scale.float()[index].double()
        low, high = part.min(), part.max()
        # float32 rounds the quotient and the product, by far less than a hundredth of a step here.
        assert (read[place].double() - part).abs().max() <= 0.51 * step
        largest, span = max(high, -low), high - low
        if fmt.symmetric:
            span = 2 * largest
        elif fmt.bits == 8:
            span = max(high, 0) - min(low, 0)
        needed = max(span / (2**fmt.bits - 1), 0 if fmt.bits == 8 else largest / 112)
        growth = 1 + GROWTH.get(fmt.scale_dtype, 0) + 1e-6
        assert step <= max(needed * growth, smallest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_what_is_read_is_rounded_once(fmt: StateFormat, dtype: torch.dtype) -> None:
    stored = fmt.quantize(states(0, 1.0, 3.0).to(dtype))
    codes = stored.codes.double()
    if fmt.bits == 4:
        whole = stored.codes.to(torch.int64)
        codes = torch.cat((whole % 16, whole // 16), -1).double() - 8
    zero = torch.zeros_like(stored.scale.double())
    zero = zero if stored.zero_point is None else stored.zero_point.double()
    exact = torch.empty_like(codes)
    for place, index in groups(fmt, codes.shape):
        exact[place] = (codes[place] - zero[index]) * stored.scale.double()[index]
    assert torch.equal(stored.dequantize(dtype), exact.float().to(dtype))


@pytest.mark.parametrize("bits, tokens, symmetric, expected", [
    # 3 heads of 64 channels, 2,048 tokens; a scale is one byte, so is a zero point
    (8, 1, True, 3 * 2048 * (64 + 1)),
    (8, 1, False, 3 * 2048 * (64 + 2)),
    (4, 1, False, 3 * 2048 * (32 + 2)),
    (4, 64, False, 3 * (2048 * 32 + 32 * 64 * 2)),
])  # fmt: skip
def test_bytes(bits: int, tokens: int, symmetric: bool, expected: int) -> None:
    channels = None if tokens == 1 else 1
    fmt = StateFormat(bits, tokens, channels, symmetric, torch.float8_e5m2)
    stored = fmt.quantize(torch.randn(1, 3, 2048, 64))
    tensors = (stored.codes, stored.scale, stored.zero_point)
    assert sum(t.numel() * t.element_size() for t in tensors if t is not None) == expected
    assert stored.nbytes == expected
    assert stored.numel == 3 * 2048 * 64


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_pieces_are_what_the_whole_is(fmt: StateFormat) -> None:
    x = states(3, 1.0, 1.0, length=24)
    whole = fmt.quantize(x)
    joined = fmt.quantize(x[:, :, :8]).append(fmt.quantize(x[:, :, 8:]))
    read = whole.dequantize(torch.float32)
    assert torch.equal(joined.dequantize(torch.float32), read)
    assert joined.length == whole.length == 24
    assert torch.equal(whole.take(8, 24).dequantize(torch.float32), read[:, :, 8:])
    order = torch.tensor([1, 1, 0])
    assert torch.equal(whole.select(order).dequantize(torch.float32), read[order])


def test_a_taken_piece_does_not_hold_the_memory_of_the_whole() -> None:
    fmt = FORMATS[0]
    piece = fmt.quantize(states(0, 1.0, 0.0)).take(8, 16)
    assert isinstance(piece, QuantizedStates)
    assert piece.codes.untyped_storage().nbytes() == piece.codes.nbytes


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="key_group_size 24 does not divide .* 64 channels"):
        StateFormat(8, 1, 24, True, torch.float32).check("key", 64)
    with pytest.raises(UnsupportedError, match="7 channels do not fill whole bytes; choose 8"):
        StateFormat(4, 1, None, True, torch.float32).check("value", 7)
