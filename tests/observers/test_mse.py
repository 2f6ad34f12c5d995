"""The range of least error, against the error that codes of the raw values really have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.config import ActivationScheme, Plugin
from ptq.core import choose_qparams, quantize
from ptq.core.granularity import Granularity
from ptq.formats import INTEGERS
from ptq.observers import make_observer


def found(
    x: Tensor,
    name: str = "mse",
    channels: int | None = None,
    symmetric: bool = True,
    **options: object,
) -> Tensor:
    """Low and high: [2, 1] or [2, C]."""
    scheme = ActivationScheme(mode="static", symmetric=symmetric)
    observer = make_observer(Plugin(name=name, options=options), scheme, channels)
    observer.update(x)
    return torch.stack(observer.range())


def error(x: np.ndarray, low: float, high: float, symmetric: bool, norm: float = 2.0) -> float:
    """The norm's mean of what int8 does to x, in float64 and by its textbook definition."""
    if symmetric:
        scale, zero = max(high / 127.5, -low / 127.5), 0.0
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        zero = np.clip(np.round(-128 - low / scale), -128, 127)
    codes = np.clip(np.round(x / scale) + zero, -128, 127)
    return float((np.abs(x - (codes - zero) * scale) ** norm).mean() ** (1 / norm))


def heavy(seed: int, spread: float, shift: float = 0.0, count: int = 2000) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, generator=generator)
    return x * torch.exp(spread * torch.randn(count, 1, generator=generator)) + shift


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    spread=st.floats(0, 2),
    shift=st.sampled_from([0.0, 0.3, -3.0]),
    norm=st.sampled_from([1.0, 2.0, 2.4]),
)
def test_one_threshold_against_brute_force(
    seed: int, spread: float, shift: float, norm: float
) -> None:
    """No threshold is better by more than bins can hide, or than lies between two candidates.

    To move each value within its bin changes its error by at most the bin, so the norm's mean
    changes by at most that (Minkowski), once for the range that was found and once for the best.
    A candidate is at most 256^(1/64) above any threshold: its steps and their error by as much.
    """
    x = heavy(seed, spread, shift)
    low, high = found(x, norm=norm, grid=65).flatten().tolist()
    values = x.double().numpy().ravel()
    top = np.abs(values).max()
    bin_width = top / 2048
    tried = [error(values, -t, t, True, norm) for t in top * np.linspace(1 / 256, 1, 300)]
    limit = min(tried) * 256 ** (1 / 64) + 2 * bin_width
    assert error(values, low, high, True, norm) <= limit


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_many_values_come_close_to_the_best(spread: float, shift: float) -> None:
    x = heavy(1, spread, shift, count=20_000)
    values = x.double().numpy().ravel()
    top = np.abs(values).max()
    best = min(error(values, -t, t, True) for t in top * np.linspace(0.02, 1, 400))
    low, high = found(x).flatten().tolist()
    assert error(values, low, high, True) <= 1.02 * best


@pytest.mark.parametrize(("left", "right"), [(1, 1), (1, 30), (30, 1), (0, 1), (1, 0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_two_ends_against_every_pair(left: float, right: float, sign: int) -> None:
    """Tails of different weight, which one factor for both cannot fit."""
    normal, tailed = heavy(2, 0.0, count=50_000).abs(), heavy(3, 0.7, count=50_000).abs()
    x = sign * torch.cat([-left * normal, right * tailed])
    values = x.double().numpy().ravel()
    smallest, largest = values.min(), values.max()
    shares = np.linspace(0.4, 1, 12)
    best = min(error(values, smallest * a, largest * b, False) for a in shares for b in shares)
    low, high = found(x, symmetric=False).flatten().tolist()
    assert error(values, low, high, False) <= 1.01 * best
    assert smallest <= low <= high <= largest


@pytest.mark.parametrize("symmetric", [True, False])
def test_less_error_than_minmax_on_heavy_tails(symmetric: bool) -> None:
    """With ptq's own codes; their meaning is computed here."""
    x = heavy(3, 1.0, count=100_000)
    errors = {}
    for name in ("minmax", "mse"):
        low, high = found(x, name, symmetric=symmetric)
        q = choose_qparams(low, high, INTEGERS["int8"], symmetric=symmetric)
        scale, zero = q.scale[:, None], None if q.zero_point is None else q.zero_point[:, None]
        codes = quantize(x.T, scale, zero, INTEGERS["int8"], Granularity("tensor")).double()
        back = (codes - (0 if zero is None else zero.double())) * scale.double()
        errors[name] = (back - x.T.double()).square().mean().item()
    assert errors["mse"] < 0.9 * errors["minmax"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_channel_has_its_own_range(symmetric: bool) -> None:
    scales = [1e-4, 1.0, 300.0]
    parts = [heavy(seed, spread) for seed, spread in enumerate((0.0, 0.7, 1.2))]
    together = torch.cat([p * s for p, s in zip(parts, scales, strict=True)], dim=1)
    ranges = found(together, channels=3, symmetric=symmetric)
    for channel in range(3):
        alone = found(together[:, channel : channel + 1], channels=1, symmetric=symmetric)
        assert torch.equal(ranges[:, channel], alone[:, 0])
        values = together[:, channel].double().numpy()
        top = np.abs(values).max()
        best = min(error(values, -t, t, True) for t in top * np.linspace(1 / 16, 1, 200))
        low, high = ranges[:, channel].tolist()
        # A channel's bins are as wide as 1/128 of its largest value, see above.
        limit = best * 1.05 + 2 * top / 128
        assert error(values, low, high, symmetric) <= limit


def test_a_higher_norm_clips_less() -> None:
    x = heavy(4, 1.0, count=5000)
    tops = [found(x, norm=norm).abs().max().item() for norm in (1.0, 2.0, 4.0)]
    assert tops[0] < tops[1] < tops[2] <= x.abs().max().item()


def test_data_of_one_sign() -> None:
    for x in (heavy(5, 0.5).abs() + 5, -heavy(5, 0.5).abs() - 5):
        for symmetric in (True, False):
            low, high = found(x, symmetric=symmetric)
            assert x.min() <= low <= high <= x.max()
