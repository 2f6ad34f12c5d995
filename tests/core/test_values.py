"""Granularity, formats and QuantizedWeight hold their rules."""

import pytest
import torch

from ptq.core import Granularity, QuantizedWeight, is_finite
from ptq.errors import ConfigError
from ptq.formats import INTEGERS, IntFormat


def test_format_ranges_are_those_of_torch() -> None:
    for name, dtype in (("int8", torch.int8), ("uint8", torch.uint8)):
        info = torch.iinfo(dtype)
        assert (INTEGERS[name].qmin, INTEGERS[name].qmax) == (info.min, info.max)
    assert {(f.qmin, f.qmax) for f in INTEGERS.values() if f.bits == 4} == {(-8, 7), (0, 15)}
    assert len(INTEGERS) == 14
    assert all(fmt.qmax - fmt.qmin == 2**fmt.bits - 1 for fmt in INTEGERS.values())


@pytest.mark.parametrize("bits", [1, 9])
def test_formats_have_2_to_8_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        IntFormat(bits, signed=True)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (Granularity("tensor"), (1, 1)),
        (Granularity("channel"), (8, 1)),
        (Granularity("token"), (8, 1)),
        (Granularity("group", 16), (8, 4)),
        (Granularity("group", 64), (8, 1)),
    ],
    ids=str,
)
def test_scale_shapes(granularity: Granularity, shape: tuple[int, int]) -> None:
    assert granularity.scale_shape((8, 64)) == shape
    parts = granularity.split(torch.arange(512).view(8, 64))
    assert parts.shape[:2] == shape
    assert torch.equal(parts.flatten(), torch.arange(512))


def test_group_size_that_does_not_divide_offers_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match="does not divide the input size 48; choose one of 8, 12, 16"
    ):
        Granularity("group", 32).scale_shape((4, 48))


@pytest.mark.parametrize(("kind", "size"), [("group", None), ("channel", 8), ("group", 0)])
def test_group_size_goes_with_group(kind: str, size: int | None) -> None:
    with pytest.raises(ConfigError):
        Granularity(kind, size)  # type: ignore[arg-type]


def weight(**changes: object) -> QuantizedWeight:
    fields = {
        "packed": torch.zeros(8, 16, dtype=torch.uint8),
        "scale": torch.ones(8, 2),
        "zero_point": None,
        "format": INTEGERS["int4"],
        "granularity": Granularity("group", 16),
        "shape": (8, 32),
    }
    return QuantizedWeight(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_sound_weight() -> None:
    made = weight(zero_point=torch.full((8, 2), -8, dtype=torch.int8))
    assert made.codes.shape == (8, 32)
    assert made.nbytes == 8 * 16 + 8 * 2 * 4 + 8 * 2
    # Stored zero is the code -8; with zero point -8 it stands for 0.
    assert (made.dequantize() == 0).all()
    assert (weight().dequantize() == -8).all()
    assert weight().dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {"packed": torch.zeros(8, 32, dtype=torch.uint8)},
        {"packed": torch.zeros(8, 16, dtype=torch.int8)},
        {"scale": torch.ones(8, 1)},
        {"scale": torch.ones(8, 2, dtype=torch.float64)},
        {"zero_point": torch.zeros(8, 1, dtype=torch.int8)},
        {"zero_point": torch.zeros(8, 2)},
        {"format": INTEGERS["uint4"]},
        {"input_scale": torch.ones(1)},
        {"input_zero_point": torch.tensor(1.0)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_broken_weights_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        weight(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_finite(dtype: torch.dtype) -> None:
    x = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(x)  # although its sum overflows
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[7] = bad
        assert not is_finite(x)
