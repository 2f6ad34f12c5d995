"""Sums of outer products: exact enough, and the same for every split into batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.errors import CalibrationError
from ptq.observers.second_moment import Moments, SecondMoment


def data(rows: int = 5000, features: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 2, features)
    return (torch.randn(rows, features, generator=generator) * scales + 0.5).to(dtype)


def moments(parts: list[Tensor], references: list[Tensor] | None = None) -> Moments:
    sums = SecondMoment(parts[0].shape[1], cross=references is not None)
    for index, part in enumerate(parts):
        sums.update(part, None if references is None else references[index])
    return sums.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 100, 2048, 5000])
def test_against_float64(rows: int, dtype: torch.dtype) -> None:
    """Float32 sums of at most 2048 products: relative to the sum of their magnitudes."""
    x = data(rows, dtype=dtype)
    reference = (x.float() + torch.randn(x.shape)).to(dtype)
    found = moments([x], [reference])
    wide = x.double()
    difference = (reference.float() - x.float()).double()
    assert found.rows == rows
    assert found.cross is not None
    for actual, left in ((found.second, wide), (found.cross, difference)):
        bound = 2048 * 2**-24 * (left.abs().T @ wide.abs()) / rows
        assert actual.dtype == torch.float32
        assert ((actual - left.T @ wide / rows).abs() <= bound).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 5000), max_size=8), cross=st.booleans())
def test_the_same_bits_for_every_split(cuts: list[int], cross: bool) -> None:
    x = data()
    reference = x.roll(1, 0)
    parts = list(torch.tensor_split(x, sorted(cuts)))
    references = list(torch.tensor_split(reference, sorted(cuts)))
    whole = moments([x], [reference] if cross else None)
    split = moments(parts, references if cross else None)
    assert torch.equal(whole.second, split.second)
    assert whole.rows == split.rows
    if cross:
        assert whole.cross is not None
        assert split.cross is not None
        assert torch.equal(whole.cross, split.cross)
    else:
        assert whole.cross is split.cross is None


def test_the_layout_of_the_batches_does_not_matter() -> None:
    x = data()
    strided = torch.stack([x, -x], dim=2)[:, :, 0]
    assert torch.equal(moments([x]).second, moments([strided]).second)


def test_long_sums_do_not_drift() -> None:
    """The mean over many equal chunks is that of one; a float32 sum would round 499 times."""
    chunk = data(2048, features=4)
    assert torch.equal(moments([chunk] * 499).second, moments([chunk]).second)


def test_no_rows_is_an_error_and_the_end_is_the_end() -> None:
    sums = SecondMoment(3)
    sums.update(torch.empty(0, 3))
    with pytest.raises(CalibrationError, match="saw no rows"):
        sums.finish()
    sums.update(torch.ones(2, 3))
    sums.finish()
    with pytest.raises(AssertionError, match="ended"):
        sums.update(torch.ones(2, 3))
