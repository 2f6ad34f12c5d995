"""Descent on codes and scales, held to brute force and to least squares in float64."""

import pytest
import torch
from torch import Tensor

from ptq.algorithms.clip import range_qparams
from ptq.algorithms.compensate import Codes
from ptq.algorithms.descent import Descent
from ptq.config import WeightScheme
from ptq.core import quantize
from tests.algorithms.test_algorithms import SCHEMES, scheme_of

N, K = 6, 192  # more columns than a block of the descent


def problem(scheme: WeightScheme) -> tuple[Codes, Tensor, Tensor]:
    """Codes rounded to nearest, the target [N, K], a positive definite H."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, K, generator=generator) @ torch.randn(K, K, generator=generator) / K**0.5
    target = torch.randn(N, K, generator=generator)
    qparams = range_qparams(target, scheme)
    codes = Codes.of(qparams, N, K)
    rounded = quantize(
        target, qparams.scale, qparams.zero_point, scheme.int_format, scheme.granularity_value
    )
    zero_points = codes.zero_point.repeat_interleave(codes.group_size, 0)
    codes.steps = rounded.T.float() - zero_points
    return codes, target, x.T @ x / len(x) + 0.01 * torch.eye(K)


def form(codes: Codes, target: Tensor, hessian: Tensor) -> Tensor:
    """Of each row, in float64."""
    error = codes.values().T.double() - target.double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize("name", SCHEMES)
def test_each_pass_lowers_the_form_and_keeps_the_slope(name: str) -> None:
    scheme = scheme_of(name)
    codes, target, hessian = problem(scheme)
    descent = Descent(codes, target, hessian, scheme)
    before = form(codes, target, hessian).sum()
    for step in (descent.move_codes, descent.tune_scales, descent.move_codes):
        step()
        after = form(codes, target, hessian).sum()
        assert float(after) <= float(before) * (1 + 1e-5)
        before = after
        slope = hessian @ (codes.values() - target.T)
        assert torch.allclose(descent._slope, slope, atol=1e-4)
        fmt = scheme.int_format
        whole = codes.steps + codes.zero_point.repeat_interleave(codes.group_size, 0)
        assert torch.equal(whole, whole.round().clamp(fmt.qmin, fmt.qmax))
    if name.endswith("-pow2"):
        assert bool((codes.scale.frexp().mantissa.abs() == 0.5).all())
    if not scheme.signed_scale:
        assert bool((codes.scale > 0).all())
    if scheme.granularity == "tensor":
        assert bool((codes.scale == codes.scale[0, 0]).all())


@pytest.mark.parametrize("name", ["w3a16-g16", "w2a16-g16-asym"])
def test_no_single_code_could_be_better(name: str) -> None:
    scheme = scheme_of(name)
    codes, target, hessian = problem(scheme)
    first = form(codes, target, hessian).sum()
    descent = Descent(codes, target, hessian, scheme)
    for _ in range(100):
        descent.move_codes()
    reached = form(codes, target, hessian)
    assert float(reached.sum()) < 0.7 * float(first)
    fmt, size = scheme.int_format, codes.group_size
    for k in range(K):
        for step in (-1, 1):
            old = codes.steps[k].clone()
            zero_point = codes.zero_point[k // size]
            codes.steps[k] = (old + zero_point + step).clamp(fmt.qmin, fmt.qmax) - zero_point
            assert bool((form(codes, target, hessian) >= reached * (1 - 1e-5)).all())
            codes.steps[k] = old


def test_scales_reach_least_squares() -> None:
    """Each row's scales are the coefficients of a weighted least-squares fit."""
    scheme = scheme_of("w3a16-g64").model_copy(update={"scale_dtype": "float32"})
    codes, target, hessian = problem(scheme)
    descent = Descent(codes, target, hessian, scheme)
    for _ in range(50):
        descent.tune_scales()
    root = torch.linalg.cholesky(hessian.double()).T  # |root e|^2 is e^T H e
    for row in range(N):
        design = torch.zeros(K, codes.scale.shape[0], dtype=torch.float64)
        for k in range(K):
            design[k, k // codes.group_size] = codes.steps[k, row]
        best = torch.linalg.lstsq(root @ design, root @ target[row].double()).solution
        assert torch.allclose(codes.scale[:, row].double(), best, rtol=1e-4)


def test_one_scale_for_all_is_least_squares_over_all() -> None:
    scheme = scheme_of("w4a16-tensor")
    codes, target, hessian = problem(scheme)
    Descent(codes, target, hessian, scheme).tune_scales()
    steps, h = codes.steps.double(), hessian.double()
    best = (steps * (h @ target.T.double())).sum() / (steps * (h @ steps)).sum()
    assert codes.scale[0, 0].item() == pytest.approx(best.item(), rel=1e-5)


def test_parts_that_are_all_zero_keep_their_scale() -> None:
    scheme = scheme_of("w4a16-g64")
    codes, target, hessian = problem(scheme)
    codes.steps[:64] = 0
    before = codes.scale[0].clone()
    Descent(codes, target, hessian, scheme).tune_scales()
    assert torch.equal(codes.scale[0], before)
    assert bool(codes.scale.isfinite().all())


def test_a_scale_that_rounds_to_a_worse_one_is_not_taken() -> None:
    """The best scale is 1.45, and 2 is the nearest power of two by its logarithm: 1 is better."""
    scheme = scheme_of("w4a16-pow2")
    steps = torch.arange(-8.0, 8.0)[:, None]
    codes = Codes(steps, torch.ones(1, 1), torch.zeros(1, 1))
    Descent(codes, 1.45 * steps.T, torch.eye(16), scheme).tune_scales()
    assert codes.scale.item() == 1.0
    Descent(codes, 1.6 * steps.T, torch.eye(16), scheme).tune_scales()
    assert codes.scale.item() == 2.0
