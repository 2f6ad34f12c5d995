"""Rotation: who is rotated, and what it does to the quantized layers."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.config import preset
from ptq.core import hadamard
from ptq.errors import ConfigError
from ptq.kernels.reference import Reference
from ptq.modules import QuantLinear, input_rotation, quantized_layers
from ptq.transforms import TRANSFORMS, find_groups
from tests.helpers import tiny_bert, tiny_llama
from tests.transforms.models import Called, block_of
from tests.transforms.test_transforms import error, outputs, pair, transform


def outliers() -> Called:
    """A layer that reads a norm, some of whose channels are far larger; no weight takes them
    back, so that scaling cannot help much."""
    return pair([3, 17], 60.0)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_outliers_are_spread_over_all_channels(scheme: str) -> None:
    called = outliers()
    rule = preset(scheme)
    exact = outputs(called, ("linear",))
    before = error(called, ("linear",), preset("w8a8"), exact)
    (note,) = transform("rotation", called, {"linear": rule}, {"gain": 0.0})
    assert "rotated by" in note
    (x,) = called.inputs(("linear",)).values()
    spread = x.square().mean(0)
    assert float(spread.max() / spread.mean()) < 4  # it was 16
    assert error(called, ("linear",), preset("w8a8"), exact) < before


def test_what_gains_nothing_is_left_alone() -> None:
    called = pair([], 1.0)
    weight = called.block.linear.weight.detach().clone()
    (note,) = transform("rotation", called, {"linear": preset("w8a16")}, {"gain": 0.9})
    assert note.startswith("norm -> linear: not rotated")
    assert torch.equal(called.block.linear.weight, weight)
    assert input_rotation(called.block.linear) is None


def test_signs_are_drawn_where_a_norm_holds_them() -> None:
    called = outliers()
    with torch.no_grad():  # every row is along one row of the matrix, which makes it an outlier
        called.block.norm.weight.fill_(1.0)
        noise = 0.05 * torch.randn(called.arguments[0].shape)
        called.arguments[0][:] = hadamard(4).repeat(8, 8)[:, 1] + noise
        called.arguments[0][..., 3] = 6.0
    before = called.run()
    (note,) = transform("rotation", called, {"linear": preset("w8a8")}, {"gain": 0.0})
    assert "signs" in note
    assert bool((called.block.norm.weight < 0).any())
    torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=1e-5)


def test_layers_without_a_group_are_rotated_by_themselves() -> None:
    called = block_of("llama")
    before = called.run()
    step = TRANSFORMS["rotation"]
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    schemes = dict.fromkeys(names, preset("w4a8"))
    notes = step.apply(called.block, [], called.inputs(names), {}, schemes, step.options(gain=0.0))
    assert [note.split(":")[0] for note in notes] == names
    torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=1e-5)


def test_layers_of_one_input_rotate_it_once() -> None:
    called = block_of("llama")
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    groups = [g for g in find_groups(called.block, called.arguments, called.keywords)]
    step = TRANSFORMS["rotation"]
    schemes = dict.fromkeys(names, preset("w4a8"))
    step.apply(called.block, groups, called.inputs(names), {}, schemes, step.options(gain=0.0))
    seen: list[Tensor] = []
    for name in names:
        linear = called.block.get_submodule(name)
        if input_rotation(linear) is not None:
            linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    called.run()
    assert len(seen) == 3
    assert all(x is seen[0] for x in seen)


@pytest.mark.parametrize("family", ["llama", "llama-mha", "bert", "opt", "gemma2"])
def test_heads_are_rotated_by_the_layer_that_gives_them(family: str) -> None:
    called = block_of(family)
    groups = find_groups(called.block, called.arguments, called.keywords)
    (group,) = (g for g in groups if g.kind == "heads")
    source, target = (called.block.get_submodule(n) for n in (group.source, *group.targets))
    assert isinstance(source, nn.Linear)
    with torch.no_grad():  # a channel of each head stands out
        source.weight[::8] *= 40
    before, rule = called.run(), preset("w8a8")
    exact = outputs(called, group.targets)
    worse = error(called, group.targets, rule, exact)
    step, samples = TRANSFORMS["rotation"], called.inputs(group.targets)
    schemes = dict.fromkeys(group.targets, rule)
    (note,) = step.apply(called.block, [group], samples, {}, schemes, step.options())
    assert "merged by " in note
    assert input_rotation(target) is None
    torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=1e-4)
    (x,) = called.inputs(group.targets).values()
    heads = x.reshape(-1, 8).square().mean(0)
    assert float(heads.max() / heads.mean()) < 4  # it was 8
    # A step is sqrt(8) times finer at best, so squared errors 8 times less.
    assert error(called, group.targets, rule, exact) < worse / 2


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(0, 97, (1, 24), generator=generator)} for _ in range(4)]


def rotated(model: nn.Module, scheme: str, steps: list[object]) -> nn.Module:
    always = {"name": "rotation", "options": {"gain": 0.0}}
    config = {"scheme": scheme, "recipe": [always, *steps]}
    ptq.quantize(model, config, calibration=batches())
    return model


LEARNED = {"name": "learned_rounding", "options": {"iterations": 3, "sequences": 1}}
STEPS = [["rtn"], ["gptq"], ["gptaq", LEARNED, "distill"]]


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a16"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_a_rotated_model_is_near_the_float_one(
    make: object, scheme: str, steps: list[object]
) -> None:
    assert callable(make)
    model = rotated(make(), scheme, steps)
    layers = quantized_layers(model)
    assert any(layer.scheme.input_rotation == "hadamard" for layer in layers.values())
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    for batch in batches():
        with torch.no_grad():
            exact, ours = make()(**batch)[0], model(**batch)[0]
        assert float((ours - exact).norm() / exact.norm()) < 0.1  # rotated wrongly: above 1


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g16-asym"])
def test_a_rotated_checkpoint_comes_back(scheme: str, tmp_path: Path) -> None:
    model = rotated(tiny_llama(), scheme, ["rtn"])
    ptq.save(model, tmp_path / "out")
    loaded = ptq.load(tmp_path / "out")
    again = loaded[0] if isinstance(loaded, tuple) else loaded
    batch = batches()[0]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    names = {n: m.scheme for n, m in quantized_layers(model).items()}
    assert {n: m.scheme for n, m in quantized_layers(again).items()} == names


def test_dequantizing_rotates_back() -> None:
    model = rotated(tiny_llama(), "w8a16", ["rtn"])
    layer = next(m for m in quantized_layers(model).values() if m.rotation is not None)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer.run(x, Reference()), x @ layer.weight.T)
    float_model = ptq.dequantize(copy.deepcopy(model))
    with torch.no_grad():
        a, b = model(**batches()[0]).logits, float_model(**batches()[0]).logits
    assert float((a - b).norm() / b.norm()) < 0.02  # kernels may round activations to bfloat16


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g16"])
def test_quantized_siblings_rotate_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rotated(tiny_llama(), scheme, ["rtn"])
    attention = model.get_submodule("model.layers.0.self_attn")
    layers = [attention.get_submodule(n) for n in ("q_proj", "k_proj", "v_proj")]
    assert all(isinstance(m, QuantLinear) and m.rotation is not None for m in layers)
    count = 0
    original = ptq.core.Rotation.__call__

    def counting(self: object, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return original(self, x)

    monkeypatch.setattr("ptq.core.Rotation.__call__", counting)
    x = torch.randn(2, 32)
    with torch.no_grad():
        together = [layer(x) for layer in layers]
    assert count == 1
    for layer, y in zip(layers, together, strict=True):
        assert torch.equal(layer(x.clone()), y)


def test_rotation_is_asked_for_in_the_recipe() -> None:
    with pytest.raises(ConfigError, match=r"recipe: \[rotation, rtn\]"):
        ptq.quantize(tiny_llama(), {"scheme": {"input_rotation": "hadamard"}})
    with pytest.raises(ConfigError, match="rotation comes before awq; put it last"):
        ptq.quantize(tiny_llama(), {"scheme": "w8a8", "recipe": ["rotation", "awq"]})
