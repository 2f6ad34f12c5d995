"""Hadamard matrices are what they say, of every order that there is a construction for."""

import pytest
import torch

from ptq.errors import UnsupportedError
from ptq.transforms import hadamard, rotation

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


@pytest.mark.parametrize(("n", "order"), [(1, 1), (12, 12), (52, 4), (30, 2), (49, 1), (156, 12)])
def test_a_rotation_has_the_largest_blocks_that_fit(n: int, order: int) -> None:
    r = rotation(n)
    torch.testing.assert_close(r @ r.T, torch.eye(n))
    assert int((r != 0).sum()) == n * order


def test_a_rotation_of_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="at least 1"):
        rotation(0)
