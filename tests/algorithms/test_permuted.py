"""GPTQ whose groups are of inputs alike in size: against a textbook form, and what it falls to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ptq.algorithms import ALGORITHMS, InputMoments, Outcome, round_to_nearest
from ptq.algorithms.gptq import GptqOptions
from ptq.config import Plugin
from ptq.core import QuantizedWeight
from ptq.errors import ConfigError
from ptq.plugins import check_options
from tests.algorithms.test_algorithms import SCHEMES, K, error, inputs, moments, run, weight
from tests.algorithms.test_algorithms import scheme_of as weights_of

GROUPED = [name for name in SCHEMES if "-g" in name]


def permuted(scheme: str, w: Tensor, seen: InputMoments | None, **more: Any) -> Outcome:
    return run("gptq", scheme, w, seen, act_order="permuted", **more)


def by_inputs(made: QuantizedWeight) -> Tensor:
    """float32 [N, K]: each column scattered to the input that it is for."""
    assert made.input_order is not None
    found = torch.empty(made.shape)
    found[:, made.input_order.long()] = made.dequantize()
    return found


def output_error(w: Tensor, near: Tensor, x: Tensor) -> float:
    return float(((w.double() - near.double()) @ x.double().T).square().sum())


@pytest.mark.parametrize("block", [7, 128])
def test_every_step_is_that_of_the_textbook(block: int) -> None:
    """Optimal brain quantization (Frantar et al. 2022, equation 2) in float64, column by column,
    with the values that were chosen: each is the nearest at its time, and each scale that of the
    largest weight of its group when the first column of it is reached."""
    x, w, size = inputs(), weight(), 16
    seen = moments(x)
    options = {"block": block, "clip": False, "refine": 0, "tune_scales": False}
    made = permuted("w8a16-g16", w, seen, **options).weight
    large_first = x.square().sum(0).argsort(descending=True).tolist()
    order = [k for g in range(0, K, size) for k in sorted(large_first[g : g + size])]
    assert made.input_order is not None and made.input_order.tolist() == order
    hessian = seen.second.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    left, inverse, near = w.double(), hessian.inverse(), by_inputs(made).double()
    for place, k in enumerate(order):
        scale = made.scale[:, place // size].double()
        if place % size == 0:
            largest = left[:, order[place : place + size]].abs().amax(1)
            torch.testing.assert_close(scale, largest / 127.5, rtol=1e-3, atol=0)  # of float16
        off = (left[:, k] / scale).clamp(-128, 127) - near[:, k] / scale
        assert float(off.abs().max()) < 0.51
        error = left[:, k] - near[:, k]
        left = left - (error / inverse[k, k])[:, None] * inverse[k]
        inverse = inverse - inverse[:, k, None] * inverse[k] / inverse[k, k]
        rest = order[place + 1 :]
        inverse[k, rest] = inverse[rest, k] = 0.0
        inverse[k, k] = 1.0  # done with


@pytest.mark.parametrize("scheme", GROUPED)
@pytest.mark.parametrize("name", ["gptq", "gptaq"])
def test_better_than_round_to_nearest_and_its_own_error(name: str, scheme: str) -> None:
    x, w = inputs(), weight()
    seen = moments(x, x) if name == "gptaq" else moments(x)
    made = run(name, scheme, w, seen, act_order="permuted")
    assert made.notes == ()
    plain = error(w, Outcome(round_to_nearest(w, weights_of(scheme))), x)
    assert output_error(w, by_inputs(made.weight), x) < 0.75 * plain
    assert torch.equal(made.weight.restored(made.weight.dequantize()), by_inputs(made.weight))
    assert torch.equal(made.weight.sorted(by_inputs(made.weight)), made.weight.dequantize())


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-tensor", "w8a16"])
def test_without_groups_there_is_nothing_to_sort(scheme: str) -> None:
    w, seen = weight(), moments(inputs())
    made, static = permuted(scheme, w, seen).weight, run("gptq", scheme, w, seen).weight
    assert made.input_order is None
    assert torch.equal(made.packed, static.packed)
    assert torch.equal(made.scale, static.scale)


@pytest.mark.parametrize(
    "seen", [None, InputMoments(torch.full((K, K), torch.nan), None, 8)], ids=["unreached", "nan"]
)
def test_round_to_nearest_is_in_the_order_of_the_inputs(seen: InputMoments | None) -> None:
    """The plan has said that there is an order, so there is one."""
    made = permuted("w4a16-g16", weight(), seen)
    assert "rounded to nearest" in made.notes[0]
    assert made.weight.input_order is not None
    assert made.weight.input_order.tolist() == list(range(K))
    plain = round_to_nearest(weight(), weights_of("w4a16-g16"))
    assert torch.equal(made.weight.packed, plain.packed)


def test_layers_of_one_input_have_one_order() -> None:
    seen = moments(inputs())
    a, b = (permuted("w4a16-g16", weight(seed), seen).weight for seed in (0, 1))
    assert a.input_order is not None and b.input_order is not None
    assert torch.equal(a.input_order, b.input_order)


def test_the_names() -> None:
    for given, wanted in ((True, "static"), (False, "none"), ("permuted", "permuted")):
        assert check_options("step", _step(given), GptqOptions).act_order == wanted
    assert ALGORITHMS["gptaq"].options.model_validate({"act_order": False}).act_order == "none"
    for bad in ("group", 1, None):
        with pytest.raises(ConfigError, match=r"step gptq: option 'act_order': .*'permuted'.*got"):
            check_options("step", _step(bad), GptqOptions)


def _step(act_order: Any) -> Plugin:
    return Plugin(name="gptq", options={"act_order": act_order})
