"""GPTQ against the textbook form of its algorithm, and every remedy it knows."""

import pytest
import torch
from torch import Tensor

from ptq.algorithms import InputMoments, Outcome, round_to_nearest
from ptq.algorithms.clip import search_qparams
from ptq.algorithms.compensate import Codes, Compensation
from ptq.algorithms.hessian import factorize, falling
from ptq.config import preset
from tests.algorithms.test_algorithms import K, error, inputs, moments, run, weight

PLAIN = {"refine": 0, "tune_scales": False}  # the paper's algorithm, nothing after it


def textbook(
    w: Tensor, scale: Tensor, hessian: Tensor, order: list[int], fmt: tuple[int, int]
) -> Tensor:
    """Optimal brain quantization in a fixed order (Frantar et al. 2022, equation 2), in float64:
    after each column, the inverse of the remaining H by elimination. Per-channel, symmetric."""
    w, inverse = w.double().clone(), hessian.double().inverse()
    for k in order:
        near = (w[:, k] / scale).round().clamp(*fmt) * scale
        step = (w[:, k] - near) / inverse[k, k]
        w -= step[:, None] * inverse[k]
        w[:, k] = near
        inverse = inverse - inverse[:, k, None] * inverse[k] / inverse[k, k]
        inverse[k, k] = 1.0  # done with
        rest = [j for j in order if j != k]
        inverse[k, rest] = inverse[rest, k] = 0.0
    return w


@pytest.mark.parametrize("act_order", ["static", "permuted", "none"])
@pytest.mark.parametrize("block", [7, 128])
def test_equals_the_textbook(act_order: str, block: int) -> None:
    x, w = inputs(), weight()
    seen = moments(x)
    options = {"act_order": act_order, "block": block, "clip": False, **PLAIN}
    made = run("gptq", "w8a16", w, seen, **options).weight
    hessian = seen.second.clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    order = list(range(K))
    if act_order != "none":
        order = torch.argsort(seen.second.diagonal(), descending=True, stable=True).tolist()
    expected = textbook(w, made.scale.squeeze(-1).double(), hessian, order, (-128, 127))
    # A float32 sum may fall on the other side of a half: few codes may differ, each by one.
    steps = (made.dequantize().double() - expected) / made.scale.double()
    assert float(steps.abs().max()) < 1.01
    assert float((steps.abs() > 0.5).float().mean()) < 0.01


@pytest.mark.parametrize("block", [5, 16, 24, 128])
def test_the_block_does_not_matter(block: int) -> None:
    """Groups whose scales are chosen on the way see all the errors so far."""
    x, w = inputs(), weight()
    a, b = (
        run("gptq", "w4a16-g16-asym", w, moments(x), act_order=False, block=size, **PLAIN)
        for size in (block, 1)
    )
    assert float((a.weight.codes != b.weight.codes).float().mean()) < 0.02
    assert error(w, a, x) == pytest.approx(error(w, b, x), rel=0.02)


def test_a_singular_moment_needs_no_remedy() -> None:
    x, w = inputs(rows=8), weight()
    made = run("gptq", "w4a16-g16", w, moments(x))
    assert made.notes == ()
    assert error(w, made, x) < 0.3 * error(
        w, Outcome(round_to_nearest(w, preset("w4a16-g16").weights)), x
    )


def test_damping_is_raised_and_noted() -> None:
    x, w = inputs(), weight()
    second = moments(x).second
    second -= 0.05 * second.diagonal().mean() * torch.eye(K)  # as rounding may leave it
    made = run("gptq", "w4a16-g16", w, InputMoments(second, None, 512))
    assert made.notes
    assert "damping raised from 0.01 to 0.1" in made.notes[0]


def test_what_no_damping_helps_is_rounded_to_nearest() -> None:
    w = weight()
    second = -torch.eye(K) * 1e6
    second.diagonal()[0] = 1e6 * K  # the mean is positive, the matrix is not
    second[0, 1:] = second[1:, 0] = 1e9
    made = run("gptq", "w4a16-g16", w, InputMoments(second, None, 512))
    assert "rounded to nearest" in made.notes[-1]
    assert torch.equal(made.weight.packed, round_to_nearest(w, preset("w4a16-g16").weights).packed)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_moments_that_are_no_numbers(bad: float) -> None:
    second = torch.eye(K)
    second[3, 4] = bad
    made = run("gptq", "w4a16-g16", weight(), InputMoments(second, None, 512))
    assert made.notes == ("its second moment has NaN or Inf: rounded to nearest",)


def test_a_layer_that_no_row_reaches() -> None:
    made = run("gptq", "w4a16-g16", weight(), None)
    assert made.notes == ("no calibration row reaches it: rounded to nearest",)


def test_dead_channels_keep_the_nearest_codes() -> None:
    x, w = inputs(), weight()
    dead = [3, 40]
    x[:, dead] = 0
    made = run("gptq", "w8a16", w, moments(x), clip=False, tune_scales=False)
    assert made.notes == ()
    plain = round_to_nearest(w, preset("w8a16").weights)
    assert torch.equal(made.weight.codes[:, dead], plain.codes[:, dead])


def test_small_inputs_are_not_drowned_by_dead_channels() -> None:
    """All inputs 1024 times smaller: the same codes, bit for bit."""
    x, w = inputs(), weight()
    x[:, 10:30] = 0
    a, b = (run("gptq", "w4a16-g16", w, moments(x * size)).weight for size in (1.0, 2.0**-10))
    assert torch.equal(a.packed, b.packed)


def test_a_layer_whose_rows_are_all_zero() -> None:
    made = run("gptq", "w4a16-g16", weight(), InputMoments(torch.zeros(K, K), None, 8), **PLAIN)
    plain = round_to_nearest(weight(), preset("w4a16-g16").weights)
    assert torch.equal(made.weight.packed, plain.packed)


def test_no_rows_are_no_moments() -> None:
    made = run("gptq", "w4a16-g16", weight(), InputMoments(torch.zeros(K, K), None, 0))
    assert made.notes == ("no calibration row reaches it: rounded to nearest",)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_that_of_the_inverse(act_order: bool) -> None:
    second = moments(inputs()).second
    order = falling(second) if act_order else torch.arange(K)
    factor = factorize(second, order if act_order else None, 0.01)
    assert factor is not None
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    ordered = factor.hessian.double()[order][:, order]
    near_one = upper.T @ upper @ ordered
    assert torch.allclose(near_one, torch.eye(K, dtype=torch.float64), atol=1e-3)


def test_float64_comes_before_more_damping() -> None:
    second = moments(inputs(rows=8)).second
    damping = 3e-7
    damped = second + damping * second.diagonal().mean() * torch.eye(K)
    assert int(torch.linalg.cholesky_ex(damped).info) > 0  # not in float32
    factor = factorize(second, None, damping)
    assert factor is not None
    assert factor.notes == ()


def test_what_is_worse_than_round_to_nearest_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(self: Compensation, target: Tensor) -> Codes:
        qparams = search_qparams(target, self.scheme, None, self.search)
        return Codes.of(qparams, *target.shape)  # all zero

    monkeypatch.setattr(Compensation, "run", spoiled)
    made = run("gptq", "w4a16-g16", weight(), moments(inputs()), **PLAIN)
    assert made.notes == ("worse than round to nearest, which takes its place",)
    plain = round_to_nearest(weight(), preset("w4a16-g16").weights)
    assert torch.equal(made.weight.packed, plain.packed)


@pytest.mark.parametrize("scheme", ["w3a16-g16", "w3a16-g32-asym", "w8a16"])
def test_descent_and_tuned_scales_each_lower_the_error(scheme: str) -> None:
    x, w = inputs(), weight()

    def off(refine: int, tune_scales: bool) -> float:
        made = run("gptq", scheme, w, moments(x), refine=refine, tune_scales=tune_scales)
        return error(w, made, x)

    assert off(0, True) < 0.999 * off(0, False)
    assert off(2, False) < 0.999 * off(0, False)
    assert off(2, True) < min(off(0, True), off(2, False))
