"""Hadamard matrices are what they say, and rotations are made of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.core import Rotation, hadamard
from ptq.errors import UnsupportedError

MISSING = {52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244}
ORDERS = [1, 2, *(n for n in range(4, 257, 4) if n not in MISSING), 576, 960, 1536]


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal(n: int) -> None:
    h = hadamard(n)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, n * torch.eye(n))


@pytest.mark.parametrize("n", [-4, 0, 3, 6, 30, *sorted(MISSING)])
def test_other_orders_are_refused(n: int) -> None:
    with pytest.raises(UnsupportedError, match=f"order {n} .* near it: "):
        hadamard(n)


SIZES = [(1, 1), (2, 2), (12, 12), (30, 2), (49, 1), (52, 4), (144, 144), (576, 576), (1536, 1536)]


@pytest.mark.parametrize(("size", "order"), SIZES)
def test_a_rotation_has_the_largest_blocks_that_fit(size: int, order: int) -> None:
    rotation = Rotation.of(size)
    dense = rotation(torch.eye(size))
    assert rotation.order == order
    assert int((dense != 0).sum()) == size * order
    assert dense.abs()[dense != 0].unique().numel() == 1
    factor = float(dense[0].square().sum())
    assert 0.5 <= factor <= 2.0
    assert torch.equal(dense @ dense.T, factor * torch.eye(size))
    assert torch.equal(rotation.transposed(torch.eye(size)), dense.T)


@pytest.mark.parametrize("size", [576, 960, 1024, 1536, 4096, 11008])
def test_a_rotation_is_cheap(size: int) -> None:
    rotation = Rotation.of(size)
    assert rotation.left + rotation.right <= 256


@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**31))
def test_rotated_inputs_and_weights_give_the_same_product(size: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    w = torch.randn(3, size, generator=generator)
    rotation = Rotation.of(size)
    rotated = rotation.weight(w)
    # float32 rounds each product's terms: sqrt(size) of them, with a margin.
    bound = 8 * 2.0**-24 * (size**0.5 + 4) * x.norm(dim=1, keepdim=True) * w.double().norm(dim=1)
    assert ((rotation(x) @ rotated.double().T - x @ w.double().T).abs() <= bound).all()
    torch.testing.assert_close(rotation.restored(rotated), w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_entries_are_exact_in_narrow_dtypes(dtype: torch.dtype) -> None:
    rotation = Rotation.of(1536)
    assert torch.equal(rotation(torch.eye(1536, dtype=dtype)).float(), rotation(torch.eye(1536)))
    assert rotation(torch.ones(2, 3, 1536, dtype=dtype)).dtype == dtype
    x = torch.randn(2, 3, 1536, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(rotation(x), rotation(x.float()).to(dtype))  # rounded once


def test_channels_are_mixed_only_within_a_head() -> None:
    rotation = Rotation.of(24, within=8)
    head = Rotation.of(8)(torch.eye(8))
    assert torch.equal(rotation(torch.eye(24)), torch.block_diag(head, head, head))
    with pytest.raises(UnsupportedError, match="24 channels are no multiple of 7"):
        Rotation.of(24, within=7)


def test_a_rotation_of_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="at least 1"):
        Rotation.of(0)
