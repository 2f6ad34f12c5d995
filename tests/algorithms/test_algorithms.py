"""Every algorithm on every kind of scheme, judged by the layer's own inputs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.algorithms import ALGORITHMS, InputMoments, Outcome, round_to_nearest
from ptq.algorithms.clip import ClipOptions, range_qparams, search_qparams
from ptq.config import WeightScheme, preset
from ptq.core import QParams, dequantize, quantize

SCHEMES = (
    "w4a16-g16", "w4a16-g16-asym", "w4a16", "w8a16", "w4a16-tensor", "w3a16-g32-asym",
    "w2a16-g16-asym", "w8a16-asym",
)  # fmt: skip
N, K = 24, 64


def inputs(rows: int = 512, seed: int = 0) -> Tensor:
    """Correlated, and with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5
    size = torch.logspace(-1, 1, K)[torch.randperm(K, generator=generator)]
    return torch.randn(rows, K, generator=generator) @ mix * size


def weight(seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.1


def moments(x: Tensor, exact: Tensor | None = None) -> InputMoments:
    cross = None if exact is None else (exact - x).T @ x / len(x)
    return InputMoments(x.T @ x / len(x), cross, len(x))


def run(name: str, scheme: str, w: Tensor, seen: InputMoments | None, **options: Any) -> Outcome:
    algorithm = ALGORITHMS[name]
    checked = algorithm.options.model_validate(options)
    return algorithm.quantize(w, preset(scheme).weights, seen, checked)


def error(w: Tensor, made: Outcome, x: Tensor) -> float:
    """Of the layer's output, in float64."""
    difference = (w.double() - made.weight.dequantize().double()) @ x.double().T
    return float(difference.square().sum())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_worse_than_round_to_nearest(name: str, scheme: str) -> None:
    x, w = inputs(), weight()
    before = w.clone()
    seen = moments(x, x) if ALGORITHMS[name].needs_cross else moments(x)
    made = run(name, scheme, w, seen)
    plain = Outcome(round_to_nearest(w, preset(scheme).weights))
    assert torch.equal(w, before)
    assert made.weight.shape == (N, K)
    assert made.weight.scale.dtype == preset(scheme).weights.torch_scale_dtype
    assert (made.weight.zero_point is None) == preset(scheme).weights.symmetric
    if ALGORITHMS[name].needs_moments:
        assert error(w, made, x) < 0.75 * error(w, plain, x)
    elif name == "rtn":
        assert torch.equal(made.weight.packed, plain.weight.packed)
    else:
        p = 0.7
        ours = (w - made.weight.dequantize()).abs().pow(p).sum()
        assert float(ours) <= float((w - plain.weight.dequantize()).abs().pow(p).sum())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_same_input_same_bits(name: str) -> None:
    seen = moments(inputs(), inputs(seed=1))
    a, b = (run(name, "w4a16-g16-asym", weight(), seen).weight for _ in range(2))
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w3a16-g16-asym"])
def test_hqq_lowers_its_norm(scheme: str) -> None:
    heavy = torch.distributions.StudentT(2.0).sample((N, K))
    plain = round_to_nearest(heavy, preset(scheme).weights).dequantize()
    made = run("hqq", scheme, heavy, None).weight.dequantize()
    assert (heavy - made).abs().pow(0.7).sum() < 0.98 * (heavy - plain).abs().pow(0.7).sum()


def squared(w: Tensor, scheme: WeightScheme, qparams: QParams, importance: Tensor) -> Tensor:
    """Error of each part by ptq's own rounding, which other tests hold to the definition."""
    gran = scheme.granularity_value
    codes = quantize(w, qparams.scale, qparams.zero_point, scheme.int_format, gran)
    near = dequantize(codes, qparams.scale, qparams.zero_point, gran)
    return gran.split((near - w).square() * importance).sum(-1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scheme=st.sampled_from(SCHEMES), size=st.floats(1e-3, 1e3))
def test_a_clipped_range_is_never_worse(seed: int, scheme: str, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator).pow(3) * size
    importance = torch.rand(K, generator=generator)
    weights = preset(scheme).weights
    found = search_qparams(w, weights, importance, ClipOptions(clip=True))
    ours = squared(w, weights, found, importance)
    plain = squared(w, weights, range_qparams(w, weights), importance)
    assert bool((ours <= plain * (1 + 1e-4)).all())


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w3a16-g16-asym", "w3a16"])
def test_clipping_helps_heavy_tails(scheme: str) -> None:
    w = torch.randn(N, K).pow(3)
    found = run("rtn", scheme, w, None, clip=True).weight.dequantize()
    plain = round_to_nearest(w, preset(scheme).weights).dequantize()
    assert (w - found).square().sum() < 0.97 * (w - plain).square().sum()
