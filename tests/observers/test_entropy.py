"""The threshold of least divergence."""

import numpy as np
import pytest
import torch

from ptq.config import ActivationScheme, Plugin
from ptq.errors import ConfigError
from ptq.observers import make_observer
from ptq.observers.entropy import Entropy, _divergence

STATIC = ActivationScheme(mode="static")
ASYMMETRIC = ActivationScheme(mode="static", symmetric=False)


def found(x: torch.Tensor, scheme: ActivationScheme = STATIC) -> tuple[float, float]:
    observer = make_observer(Plugin(name="entropy"), scheme)
    observer.update(x)
    low, high = observer.range()
    return low.item(), high.item()


def normal(count: int = 100_000) -> torch.Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)


@pytest.mark.parametrize("outlier", [20.0, -60.0])
def test_an_outlier_is_cut_and_the_bulk_is_kept(outlier: float) -> None:
    low, high = found(torch.cat([normal(), torch.tensor([[outlier]])]))
    assert -4 < low < -2
    assert 2 < high < 4


def test_without_outliers_everything_is_kept() -> None:
    x = torch.rand(50_000, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    low, high = found(x)
    assert low <= -0.95
    assert high >= 0.95


def test_zeros_do_not_count() -> None:
    """As after a ReLU; nor does a sign that is not there widen the range."""
    x = normal().relu()
    some, many = found(x), found(torch.cat([x, torch.zeros(10 * len(x), 1)]))
    assert some == many
    assert some[0] == 0
    assert some[1] > 2


@pytest.mark.parametrize("levels", [128, 190, 256])
@pytest.mark.parametrize("size", [256, 333, 512])
def test_the_divergence_by_its_definition(size: int, levels: int) -> None:
    """A loop over bins and levels as in Migacz's slides, without smoothing."""
    x = np.abs(np.random.default_rng(0).standard_normal(20_000))
    counts, _ = np.histogram(x, bins=512, range=(0, x.max()))
    reference = counts[:size].astype(float)
    reference[-1] += counts[size:].sum()
    quantized = np.zeros(size)
    for level in range(levels):
        inside = [b for b in range(size) if b * levels // size == level and reference[b] > 0]
        for b in inside:
            whole = [b for b in range(size) if b * levels // size == level]
            quantized[b] = counts[whole].sum() / len(inside)
    p, q = reference / reference.sum(), quantized / quantized.sum()
    expected = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    actual = _divergence(torch.from_numpy(counts).double(), size, levels).item()
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-8.0, 8.0, 128), (0.0, 8.0, 256), (-8.0, 0.0, 256), (-2.0, 8.0, 205), (3.0, 8.0, 256)],
)
def test_levels_are_the_codes_from_zero_to_the_threshold(
    low: float, high: float, expected: int
) -> None:
    """With a zero point, scale and codes are those of the clipped range, zero included."""
    x = torch.linspace(low, high, 1000)[:, None]
    observers = [Entropy(None, Entropy.Options(), scheme) for scheme in (STATIC, ASYMMETRIC)]
    for observer in observers:
        observer.update(x)
    bins = 2048  # of 16 / 4096: up to the larger end
    assert [observer.levels(bins) for observer in observers] == [128, expected]
    if low == -2.0:  # cut at 2, both sides are as long
        assert observers[1].levels(512) == 128


def test_data_of_one_sign_is_cut_less_with_a_zero_point() -> None:
    """Twice as many levels are worth a longer range."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, 1, generator=generator).abs().pow(2.5)
    (_, symmetric), (low, asymmetric) = found(x), found(x, ASYMMETRIC)
    assert low >= 0
    assert symmetric < asymmetric < x.max().item()


def test_one_range_per_channel_is_refused() -> None:
    with pytest.raises(ConfigError, match="entropy: it has one range per tensor.*use mse"):
        make_observer(Plugin(name="entropy"), STATIC, 6)
