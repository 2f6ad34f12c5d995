"""Learned rounding starts from the codes it is given, and never ends worse on what it checks."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ptq.core import QuantizedWeight, pack
from ptq.refine import BlockJob
from ptq.refine.learned_rounding import LearnedRoundingOptions, _Learned, learn_rounding
from tests.refine.jobs import job

SCHEMES = ["w4a16-g16", "w4a16-g16-asym", "w3a16", "w8a16", "w4a16-tensor", "w4a8-g16"]


def error(made: BlockJob, exact: nn.Module, inputs: list[Tensor]) -> float:
    """Relative to each row's size, in float64, without any code of ptq but the codes' values."""
    copied = copy.deepcopy(made.block).double()
    for name, state in made.layers.items():
        copied.get_submodule(name).weight.data = state.weight.dequantize().double()
    total = 0.0
    for x in inputs:
        y, z = copied(x.double()), exact.double()(x.double())
        total += float(((y - z).square().mean(-1) / z.square().mean(-1)).mean())
    exact.float()
    return total


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_starts_from_the_codes_that_are_there(scheme: str) -> None:
    """Also from codes that are not the nearest ones, as GPTQ leaves them."""
    state = job(scheme)[0].layers["0"]
    weight = state.weight
    moved = torch.randint(-2, 3, weight.shape, generator=torch.Generator().manual_seed(2))
    codes = (weight.codes + moved).clamp(weight.format.qmin, weight.format.qmax).to(torch.int8)
    state.weight = QuantizedWeight(
        pack(codes, weight.format), weight.scale, weight.zero_point, weight.format,
        weight.granularity, weight.shape,
    )  # fmt: skip
    learned = _Learned.of(state)
    learned.finish(learned.keep())
    assert torch.equal(state.weight.codes, codes)
    assert torch.equal(state.weight.scale, weight.scale)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "a8" not in s and "w8" not in s])
def test_the_block_comes_nearer_to_the_float_one(scheme: str, scales: bool) -> None:
    made, exact = job(scheme)
    before = error(made, exact, made.stream.hidden)
    start = {name: state.weight for name, state in made.layers.items()}
    learn_rounding(made, LearnedRoundingOptions(iterations=40, scales=scales))
    assert error(made, exact, made.stream.hidden) < 0.8 * before
    if not scales:
        for name, state in made.layers.items():
            assert torch.equal(state.weight.scale, start[name].scale)
    unseen = [torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(9))]
    fresh, _ = job(scheme)
    assert error(made, exact, unseen) < error(fresh, exact, unseen)


def test_steps_that_do_harm_are_not_kept() -> None:
    made, exact = job("w4a16-g16")
    before = error(made, exact, made.stream.hidden)
    start = made.layers["0"].weight.codes
    options = LearnedRoundingOptions(iterations=5, learning_rate=30.0)
    (note,) = learn_rounding(made, options)
    assert torch.equal(made.layers["0"].weight.codes, start)
    assert error(made, exact, made.stream.hidden) == pytest.approx(before)
    assert note.startswith("learned rounding: error ")


def test_no_gradient_is_left_behind() -> None:
    made, _ = job("w4a8-g16")
    learn_rounding(made, LearnedRoundingOptions(iterations=2))
    for parameter in made.block.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert not any(module._forward_pre_hooks for module in made.block.modules())


def test_a_token_with_massive_activations_does_not_decide() -> None:
    """The errors count relative to the token's own size."""
    made, exact = job("w3a16")
    for x in made.stream.hidden:
        x[:, 0] *= 1e3
    made.targets[:] = [exact(x) for x in made.stream.hidden]
    ordinary = [x[:, 1:] for x in made.stream.hidden]
    before = error(made, exact, ordinary)
    learn_rounding(made, LearnedRoundingOptions(iterations=40))
    assert error(made, exact, ordinary) < 0.8 * before
