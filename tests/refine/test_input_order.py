"""Refinements of codes whose columns are in another order than the inputs: a block and its twin,
whose first layer has the same codes for inputs that are shuffled, come out the same."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ptq.algorithms import NoOptions
from ptq.refine import BlockJob, LayerState
from ptq.refine.bias_correction import correct_biases
from ptq.refine.distill import _Gain
from ptq.refine.learned_rounding import LearnedRoundingOptions, _Learned, learn_rounding
from tests.refine.jobs import job

SHUFFLED = torch.randperm(32, generator=torch.Generator().manual_seed(8))
SCHEMES = ["w4a16-g16", "w4a16-g16-asym", "w4a8-g16"]


def twins(scheme: str) -> tuple[BlockJob, BlockJob]:
    plain, (twin, _) = job(scheme)[0], job(scheme)
    state = twin.layers["0"]
    order = SHUFFLED.argsort().to(torch.int32)
    state.weight = replace(state.weight, input_order=order)
    state.original = state.original[:, SHUFFLED].clone()
    twin.stream.hidden[:] = [x[..., SHUFFLED] for x in twin.stream.hidden]
    for each in (plain, twin):
        each.layers["0"].show()
    return plain, twin


def weights(plain: LayerState, twin: LayerState) -> tuple[Tensor, Tensor]:
    return plain.linear.weight.detach()[:, SHUFFLED], twin.linear.weight.detach()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_float_layer_shows(scheme: str) -> None:
    plain, twin = twins(scheme)
    assert torch.equal(*weights(plain.layers["0"], twin.layers["0"]))
    blocks = [made.block(made.stream.hidden[0]) for made in (plain, twin)]
    torch.testing.assert_close(*blocks, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [_Learned, _Gain])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_of_descent(kind: type[_Learned] | type[_Gain], scheme: str) -> None:
    """The same gradient, of shuffled inputs."""
    states = [made.layers["0"] for made in twins(scheme)]
    gradient = torch.randn(48, 32, generator=torch.Generator().manual_seed(2))
    learned = [kind.of(state) for state in states]
    for one, given in zip(learned, (gradient, gradient[:, SHUFFLED]), strict=True):
        one.show()
        one.state.linear.weight.grad = given.clone()
        if isinstance(one, _Learned):
            one.step(0.3, LearnedRoundingOptions())
        else:
            one.pull()
            assert one.gain.grad is not None
            one.gain.data -= 0.1 * one.gain.grad
        one.show()
    assert torch.equal(learned[0].gain, learned[1].gain)
    assert not torch.equal(learned[0].gain, torch.ones_like(learned[0].gain))
    assert torch.equal(*weights(*states))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_learned_rounding(scheme: str) -> None:
    plain, twin = twins(scheme)
    for made in (plain, twin):
        learn_rounding(made, LearnedRoundingOptions(iterations=10))
    ours, theirs = (made.layers["0"].weight for made in (twin, plain))
    # The sign of a gradient next to nothing may turn over with the order of a float32 sum.
    assert float((ours.codes != theirs.codes).float().mean()) < 0.02
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=0.02, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bias_correction(scheme: str) -> None:
    made = twins(scheme)
    for each in made:
        correct_biases(each, NoOptions())
    biases = [each.layers["0"].linear.bias.detach() for each in made]
    torch.testing.assert_close(*biases, rtol=0, atol=2e-5)
