"""GPTAQ: the error of the layers before is made up for, held to least squares on the rows."""

import pytest
import torch
from torch import Tensor

from ptq.algorithms import InputMoments, round_to_nearest
from ptq.algorithms.hessian import output_error
from ptq.config import preset
from tests.algorithms.test_algorithms import K, inputs, moments, run, weight


def disturbed() -> tuple[Tensor, Tensor]:
    """The float model's input, and the layer's own."""
    exact = inputs(2048)
    noise = torch.randn(2048, K, generator=torch.Generator().manual_seed(1))
    return exact, exact + 0.3 * noise + 0.2 * exact.roll(1, dims=1)


def off(made: Tensor, x: Tensor, wanted: Tensor) -> float:
    return float((x.double() @ made.double().T - wanted.double()).square().sum())


def test_the_best_weight_is_the_least_squares_one() -> None:
    (exact, x), w = disturbed(), weight()
    wanted = exact @ w.T
    best = torch.linalg.lstsq(x, wanted).solution.T
    least = off(best, x, wanted)
    options = {"damping": 1e-6}
    gptaq = run("gptaq", "w8a16", w, moments(x, exact), **options).weight.dequantize()
    gptq = run("gptq", "w8a16", w, moments(x, exact), **options).weight.dequantize()
    assert off(gptaq, x, wanted) < 1.02 * least
    assert off(gptq, x, wanted) > 1.3 * least


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_it_is_that_share_of_the_way(share: float) -> None:
    (exact, x), w = disturbed(), weight()
    best = torch.linalg.lstsq(x, exact @ w.T).solution.T
    partly = w + share * (best - w)
    seen = moments(x, exact)
    made = run("gptaq", "w8a16", w, seen, feedback=share, damping=1e-6).weight.dequantize()
    assert off(made, x, x @ partly.T) < 0.01 * off(made, x, x @ w.T)


def test_the_error_by_moments_is_the_error_by_rows() -> None:
    """Up to a constant: so differences between two weights are compared."""
    (exact, x), w = disturbed(), weight()
    seen = moments(x, exact)
    assert seen.cross is not None
    two = [round_to_nearest(w, preset(name).weights) for name in ("w4a16", "w3a16-g16")]
    a, b = (output_error(w, q, seen.second, w @ seen.cross) for q in two)
    c, d = (off(q.dequantize(), x, exact @ w.T) / len(x) for q in two)
    assert a - b == pytest.approx(c - d, rel=1e-3)


@pytest.mark.parametrize(
    ("cross", "note"),
    [
        (None, "no float input was seen beside its own: upstream error not made up for"),
        (torch.full((K, K), torch.nan), "its cross moment has NaN or Inf: "
         "upstream error not made up for"),
    ],
)  # fmt: skip
def test_without_a_cross_moment_it_is_gptq(cross: Tensor | None, note: str) -> None:
    second = moments(inputs()).second
    made = run("gptaq", "w4a16-g16", weight(), InputMoments(second, cross, 512))
    plain = run("gptq", "w4a16-g16", weight(), InputMoments(second, None, 512))
    assert made.notes == (note,)
    assert torch.equal(made.weight.packed, plain.weight.packed)
