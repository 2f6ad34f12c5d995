"""Every observer: fixed memory, independence of the batches, and the range it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.config import ActivationScheme, Plugin
from ptq.errors import CalibrationError, ConfigError
from ptq.observers import OBSERVERS, Observer, make_observer
from ptq.observers.histogram import Histogram

STATIC = ActivationScheme(mode="static")
SCHEMES = [STATIC, ActivationScheme(mode="static", symmetric=False)]
CHANNELS = (None, 6)
CASES = [(n, c) for n in OBSERVERS for c in CHANNELS if (n, c) != ("entropy", 6)]
INDEPENDENT = [(n, c) for n, c in CASES if not OBSERVERS[n].order_dependent]


def observe(
    name: str,
    parts: list[Tensor],
    channels: int | None,
    scheme: ActivationScheme = STATIC,
    **options: object,
) -> Observer:
    observer = make_observer(Plugin(name=name, options=options), scheme, channels)
    for part in parts:
        observer.update(part)
    return observer


def rows(count: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Heavy tails, so that ranges grow several times."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x * torch.exp(spread * torch.randn(count, 6, generator=generator))


def state_bytes(state: object) -> int:
    """Of the tensors, also those in a histogram."""
    values = vars(state).values()
    own = sum(v.nbytes for v in values if isinstance(v, Tensor))
    return own + sum(state_bytes(v) for v in values if isinstance(v, Histogram))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 200), max_size=6),
    case=st.sampled_from(INDEPENDENT),
    spread=st.floats(0, 4),
    scheme=st.sampled_from(SCHEMES),
)
def test_the_range_does_not_depend_on_batches_or_order(
    seed: int,
    cuts: list[int],
    case: tuple[str, int | None],
    spread: float,
    scheme: ActivationScheme,
) -> None:
    name, channels = case
    x = rows(200, seed, spread)
    whole = observe(name, [x], channels, scheme).range()
    shuffled = x[torch.randperm(200, generator=torch.Generator().manual_seed(seed))]
    parts = list(torch.tensor_split(shuffled, sorted(cuts)))
    for a, b in zip(whole, observe(name, parts, channels, scheme).range(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_memory_does_not_grow(name: str, channels: int | None) -> None:
    few = observe(name, [rows(50)], channels)
    many = observe(name, [rows(50, seed) * 1000 for seed in range(30)], channels)
    assert state_bytes(few) == state_bytes(many) > 0


@pytest.mark.parametrize(("name", "channels"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(name: str, channels: int | None, dtype: torch.dtype) -> None:
    low, high = observe(name, [rows(50).to(dtype)], channels).range()
    assert low.shape == high.shape == ((1,) if channels is None else (6,))
    assert low.dtype == high.dtype == torch.float32
    assert (low <= high).all()


@pytest.mark.parametrize("name", OBSERVERS)
def test_no_rows_is_an_error_and_empty_batches_change_nothing(name: str) -> None:
    with pytest.raises(CalibrationError, match="saw no rows"):
        observe(name, [torch.empty(0, 6)], None).range()
    with_empty = observe(name, [rows(20), torch.empty(0, 6), rows(20, 1)], None)
    assert with_empty.range() == observe(name, [rows(20), rows(20, 1)], None).range()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
def test_constant_and_zero_inputs(name: str, scheme: ActivationScheme) -> None:
    for value in (0.0, 2.5, -1e-30):
        low, high = observe(name, [torch.full((10, 6), value)], None, scheme).range()
        assert low == high == torch.tensor(value)


def test_minmax_is_exact() -> None:
    x = rows(100)
    low, high = observe("minmax", [x], 6).range()
    assert torch.equal(low, x.min(0).values)
    assert torch.equal(high, x.max(0).values)


def test_moving_average_by_its_definition() -> None:
    parts = [rows(10, seed) for seed in range(4)]
    expected = parts[0].min().item()
    for part in parts[1:]:
        expected = 0.8 * expected + 0.2 * part.min().item()
    low, _ = observe("moving_average", parts, None, momentum=0.8).range()
    assert low.item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    percentile=st.sampled_from([75.0, 90.0, 99.0, 99.9, 100.0]),
    spread=st.floats(0, 2),
)
def test_percentile_against_numpy(seed: int, percentile: float, spread: float) -> None:
    """Within one bin (1/2048 of the largest value at most) of the order statistics around it."""
    x = rows(500, seed, spread)
    low, high = observe("percentile", [x], None, percentile=percentile).range()
    values = x.numpy().ravel()
    width = np.abs(values).max() / 2048
    for found, share in ((high, percentile), (low, 100 - percentile)):
        below = np.percentile(values, share, method="lower")
        above = np.percentile(values, share, method="higher")
        assert below - width <= found.item() <= above + width


def test_percentile_of_100_keeps_everything() -> None:
    x = rows(300, spread=3)
    low, high = observe("percentile", list(x.split(7)), None, percentile=100).range()
    assert low == x.min()
    assert high == x.max()


def test_percentile_per_channel_is_that_of_each_channel() -> None:
    """Within one bin (1/128 of the channel's largest value at most), whatever the others hold."""
    x = rows(400) * torch.logspace(-3, 3, 6)
    found = observe("percentile", [x[:150], x[150:]], 6, percentile=99).range()
    for channel, values in enumerate(x.numpy().T):
        width = np.abs(values).max() / 128
        for end, share in zip(found, (1, 99), strict=True):
            below = np.percentile(values, share, method="lower")
            above = np.percentile(values, share, method="higher")
            assert below - width <= end[channel].item() <= above + width


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (Plugin(name="minimax"), "did you mean 'minmax'"),
        (Plugin(name="percentile", options={"percentil": 99}), "percentil"),
        (Plugin(name="percentile", options={"percentile": 30}), "greater than 50"),
        (Plugin(name="moving_average", options={"momentum": 1}), "less than 1"),
        (Plugin(name="minmax", options={"x": 1}), "options: none"),
        (Plugin(name="mse", options={"grid": 1}), "greater than or equal to 2"),
        (Plugin(name="mse", options={"nrm": 2.4}), "did you mean 'norm'"),
        (Plugin(name="mse", options={"symmetric": True}), "unknown option 'symmetric'"),
    ],
)
def test_mistakes(plugin: Plugin, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        make_observer(plugin, STATIC)
