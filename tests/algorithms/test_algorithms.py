"""Every algorithm on every kind of scheme, judged by the layer's own inputs."""

import sys
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
    "w2a16-g16-asym", "w8a16-asym", "w5a16-tensor-asym", "w7a16-pow2", "w4a16-g16-pow2",
    "w4a16-g16-asym-pow2",
)  # fmt: skip
N, K = 24, 64


def scheme_of(name: str) -> WeightScheme:
    """A preset's, with power-of-two scales where the name says so."""
    weights = preset(name.removesuffix("-pow2")).weights
    return weights.model_copy(update={"power_of_two_scale": name.endswith("-pow2")})


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
    return algorithm.quantize(w, scheme_of(scheme), seen, checked)


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
    plain = Outcome(round_to_nearest(w, scheme_of(scheme)))
    assert torch.equal(w, before)
    assert made.weight.shape == (N, K)
    assert made.weight.scale.dtype == scheme_of(scheme).torch_scale_dtype
    assert made.notes == ()
    if scheme.endswith("-pow2"):
        assert bool((made.weight.scale.float().frexp().mantissa.abs() == 0.5).all())
    if not scheme_of(scheme).signed_scale:
        assert bool((made.weight.scale > 0).all())
    assert (made.weight.zero_point is None) == scheme_of(scheme).symmetric
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
    plain = round_to_nearest(heavy, scheme_of(scheme)).dequantize()
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
    weights = scheme_of(scheme)
    found = search_qparams(w, weights, importance, ClipOptions(clip=True))
    ours = squared(w, weights, found, importance)
    plain = squared(w, weights, range_qparams(w, weights), importance)
    assert bool((ours <= plain * (1 + 1e-4)).all())


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w3a16-g16-asym", "w3a16"])
def test_clipping_helps_heavy_tails(scheme: str) -> None:
    w = torch.randn(N, K).pow(3)
    found = run("rtn", scheme, w, None, clip=True).weight.dequantize()
    plain = round_to_nearest(w, scheme_of(scheme)).dequantize()
    assert (w - found).square().sum() < 0.97 * (w - plain).square().sum()


def test_clipping_minds_the_columns_that_matter() -> None:
    """A large weight whose input is all but zero does not widen the range."""
    w = weight()
    w[:, 5] = 2.0
    x = inputs()
    x[:, 5] = 1e-4
    made = run("rtn", "w4a16", w, moments(x), clip=True)
    blind = run("rtn", "w4a16", w, None, clip=True)
    assert error(w, made, x) < 0.5 * error(w, blind, x)


def test_clipping_without_numbers_counts_all_columns_the_same() -> None:
    seen = InputMoments(torch.full((K, K), torch.nan), None, 8)
    made = run("rtn", "w3a16-g16", weight(), seen, clip=True)
    blind = run("rtn", "w3a16-g16", weight(), None, clip=True)
    assert torch.equal(made.weight.packed, blind.weight.packed)
    assert made.notes == ("its second moment has NaN or Inf: all columns count the same",)


def test_both_signs_of_a_scale_are_tried() -> None:
    """The range's own rule would take the sign of the larger end; two weights outvote it."""
    w = torch.tensor([[-8.0, -8.0, -8.0, 8.2, 0.0, 1.0, 2.0, 3.0]])
    weights = scheme_of("w4a16")
    assert range_qparams(w, weights).scale.item() < 0
    assert search_qparams(w, weights, None, ClipOptions(clip=True)).scale.item() > 0


@pytest.mark.parametrize("scheme", ["w4a16-g16-asym", "w4a16", "w3a16-tensor"])
@pytest.mark.parametrize("name", ["rtn", "hqq"])
def test_rows_in_pieces_are_the_same_rows(
    name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"clip": True} if name == "rtn" else {}
    whole = run(name, scheme, weight(), None, **options).weight
    for module in ("ptq.algorithms.clip", "ptq.algorithms.rtn"):
        monkeypatch.setattr(sys.modules[module], "_AT_ONCE", 5 * K)
    pieces = run(name, scheme, weight(), None, **options).weight
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.scale, pieces.scale)
