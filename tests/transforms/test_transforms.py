"""Every transform keeps what the float block computes, and brings the quantized layers nearer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq.config import ActivationScheme, Scheme, preset
from ptq.transforms import TRANSFORMS, ChannelStats, ScaleGroup, find_groups
from ptq.transforms.search import quantize_input
from tests.helpers import quant_linear
from tests.transforms.models import FAMILIES, Called, block_of

SCHEMES = ["w8a8", "w4a16-g8-asym", "w4a8", "w8a8-static"]
SCALING = ["smoothquant", "awq"]  # of norms too, by what their readers see
LEFT = ("no scaling", "not rotated")  # words of notes on what stays as it is


def stats_of(samples: dict[str, Tensor]) -> dict[str, ChannelStats]:
    return {n: ChannelStats(x.abs().amax(0), x.abs().mean(0)) for n, x in samples.items()}


def transform(
    name: str, called: Called, schemes: dict[str, Scheme], options: dict[str, Any] | None = None
) -> list[str]:
    """Find groups, sample, and apply a transform, as the engine does."""
    step = TRANSFORMS[name]
    groups = find_groups(called.block, called.arguments, called.keywords)
    samples = called.inputs(list(schemes))
    made = step.options.model_validate(options or {})
    return step.apply(called.block, groups, samples, stats_of(samples), schemes, made)


def error(
    called: Called, names: tuple[str, ...], scheme: Scheme, exact: dict[str, Tensor]
) -> float:
    """Of quantized layers on what the block now gives them, by the modules that users run."""
    total = 0.0
    for name, x in called.inputs(names).items():
        linear = called.block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            total += float((quant_linear(linear, scheme)(x) - exact[name]).square().sum())
    return total


def outputs(called: Called, names: tuple[str, ...]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {n: called.block.get_submodule(n)(x) for n, x in called.inputs(names).items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_float_block_stays_what_it_was(name: str, family: str, scheme: str) -> None:
    called = block_of(family)
    before, weights = called.run(), called.block.state_dict()
    weights = {n: w.clone() for n, w in weights.items()}
    groups = find_groups(called.block, called.arguments, called.keywords)
    notes = transform(name, called, dict.fromkeys(called.linears(), preset(scheme)))
    named = [note.split(":")[0] for note in notes]
    assert named[: len(groups)] == [str(group) for group in groups]
    torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=2e-5)
    scaled = [note for note in notes if not any(word in note for word in LEFT)]
    changed = [n for n, w in called.block.state_dict().items() if not torch.equal(w, weights[n])]
    assert bool(changed) == bool(scaled)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g8-asym", "w4a8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bert", "gpt_neox"])
@pytest.mark.parametrize("name", SCALING)
def test_no_group_gets_worse_and_some_get_better(name: str, family: str, scheme: str) -> None:
    called, rule = block_of(family), preset(scheme)
    groups = find_groups(called.block, called.arguments, called.keywords)
    better = 0
    for group in groups:  # one at a time: a later group changes the units of an earlier one
        exact = outputs(called, group.targets)
        before = error(called, group.targets, rule, exact)
        transform(name, called, dict.fromkeys(group.targets, rule))
        after = error(called, group.targets, rule, exact)
        assert after <= before * 1.01
        better += after < before * 0.99
    assert better > 0 or name not in SCALING


class Pair(nn.Module):
    """A norm and a layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


def pair(channels: list[int], factor: float) -> Called:
    """A pair some of whose channels are larger."""
    torch.manual_seed(0)
    block = Pair().eval()
    with torch.no_grad():
        block.norm.weight[channels] *= factor
    return Called(block, (torch.randn(4, 50, 32),), {})


@pytest.mark.parametrize("mode", ["w8a8", "w8a8-static"])
def test_smoothquant_takes_planted_outliers_out_of_the_input(mode: str) -> None:
    called = pair([3, 17, 30], 50.0)
    with torch.no_grad():  # outliers that the next layer takes back, as trained ones do
        called.block.linear.weight[:, [3, 17, 30]] /= 50.0
    exact, rule = outputs(called, ("linear",)), preset("w8a8")
    before = error(called, ("linear",), rule, exact)
    (note,) = transform("smoothquant", called, {"linear": preset(mode)})
    assert error(called, ("linear",), rule, exact) < before / 25  # squared: five times nearer
    first, second = (float(x) for x in note.split("relative error ")[1].split(" -> "))
    assert second < first / 5


def test_awq_saves_small_weights_that_large_inputs_meet() -> None:
    called = pair([3, 17, 30], 50.0)
    with torch.no_grad():  # there is room in their rows
        called.block.linear.weight[:, [3, 17, 30]] /= 10.0
    exact, rule = outputs(called, ("linear",)), preset("w4a16")
    before = error(called, ("linear",), rule, exact)
    transform("awq", called, {"linear": rule})
    assert error(called, ("linear",), rule, exact) < before / 4


def test_a_given_strength_is_the_formula_of_the_paper() -> None:
    called = pair([3, 17], 20.0)
    old = called.block.linear.weight.detach().clone()
    x = called.inputs(("linear",))["linear"].abs().amax(0)
    (note,) = transform("smoothquant", called, {"linear": preset("w8a8")}, {"strength": 0.75})
    assert "strength 0.75" in note
    s = x**0.75 / old.abs().amax(0) ** 0.25
    s /= s.log().mean().exp()
    torch.testing.assert_close(called.block.linear.weight.detach(), old * s)


@pytest.mark.parametrize("shape", ["w3a16", "w3a16-g8"])
def test_awq_weighs_by_the_mean_weight_relative_to_its_scale(shape: str) -> None:
    called, rule = pair([], 1.0), preset(shape)
    with torch.no_grad():  # some columns are small, and their inputs are as large as the others'
        called.block.linear.weight[:, ::4] /= 6.0
        called.block.linear.weight[5] *= 100.0  # a row counts as much as any other
    old = called.block.linear.weight.detach().clone()
    (note,) = transform("awq", called, {"linear": rule}, {"grid": 1})
    assert "strength 0 with weights" in note
    width = rule.weights.group_size or 32
    parts = old.abs().reshape(24, -1, width)
    s = 1 / (parts / parts.amax(-1, keepdim=True)).reshape(24, 32).mean(0)
    s /= s.log().mean().exp()
    torch.testing.assert_close(called.block.linear.weight.detach(), old * s)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_input_has_the_range_of_its_rows(symmetric: bool) -> None:
    x = torch.rand(50, 16, generator=torch.Generator().manual_seed(0)) * 7 - 2
    scheme = ActivationScheme(mode="static", symmetric=symmetric)
    made = quantize_input(x, scheme)
    reach = float(x.abs().max() / 127.5 if symmetric else (x.max() - x.min()) / 255)
    assert float((made - x).abs().max()) <= reach / 2 * 1.001
    assert 100 < made.unique().numel() <= 256
    assert torch.equal(quantize_input(x, None), x)


@pytest.mark.parametrize("name", SCALING)
def test_channels_without_input_keep_their_scale(name: str) -> None:
    called = pair([3], 50.0)
    called.arguments[0][..., 9] = 0.0
    old = called.block.linear.weight.detach().clone()
    assert "no scaling" not in transform(name, called, {"linear": preset("w4a8")})[0]
    new = called.block.linear.weight.detach()
    assert torch.equal(new[:, 9], old[:, 9])
    assert not torch.equal(new[:, 3], old[:, 3])


@pytest.mark.parametrize("name", SCALING)
def test_groups_that_are_left_alone(name: str) -> None:
    called = block_of("llama")
    weights = {n: w.clone() for n, w in called.block.state_dict().items()}
    assert transform(name, called, {}) == []
    step, rule = TRANSFORMS[name], preset("w8a8")
    group = [ScaleGroup("mlp.up_proj", ("mlp.down_proj",), "linear")]
    schemes = {"mlp.down_proj": rule}
    (note,) = step.apply(called.block, group, {}, {}, schemes, step.options())
    assert "no calibration row reaches it" in note
    after = called.block.state_dict()
    assert all(torch.equal(after[n], w) for n, w in weights.items())


@pytest.mark.parametrize("name", SCALING)
def test_a_source_with_one_scale_is_left_alone(name: str) -> None:
    called = block_of("llama")
    weights = {n: w.clone() for n, w in called.block.state_dict().items()}
    step = TRANSFORMS[name]
    group = [ScaleGroup("mlp.up_proj", ("mlp.down_proj",), "linear")]
    schemes = {"mlp.down_proj": preset("w8a8"), "mlp.up_proj": preset("w8a8-tensor")}
    samples = called.inputs(("mlp.down_proj",))
    (note,) = step.apply(called.block, group, samples, stats_of(samples), schemes, step.options())
    assert "one scale for its whole weight" in note
    after = called.block.state_dict()
    assert all(torch.equal(after[n], w) for n, w in weights.items())


@pytest.mark.parametrize("name", SCALING)
def test_float_readers_of_a_scaled_norm_are_scaled_along(name: str) -> None:
    called = block_of("llama")
    before = called.run()
    key = "self_attn.k_proj"
    old = called.block.get_submodule(key).weight.detach().clone()
    (note,) = transform(name, called, {"self_attn.q_proj": preset("w4a8")})
    assert "no scaling" not in note
    assert not torch.equal(called.block.get_submodule(key).weight, old)
    torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=1e-5)
