"""Modules of other kinds give way to linear layers over the same memory, and come back."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptq.model import fold, folded, read_layers, replace_module, stands_for, unfold, unfolded
from tests.huggingface.families import float_model, output

FAMILIES = ["gpt2", "mixtral", "qwen3_moe", "gpt_oss"]


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_stay_and_all_comes_back(family: str) -> None:
    model = float_model(family)
    before, was = output(model), kinds(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unfold(model)
    assert kinds(model) != was
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)
    names = fold(model)
    assert names and kinds(model) == was
    after = model.state_dict()
    assert after.keys() == values.keys()
    assert all(torch.equal(after[name], old) for name, old in values.items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_read_as_if_unfolded(family: str) -> None:
    """Reading changes nothing; kinds differ, which say where a layer comes from."""
    model = float_model(family)
    was = kinds(model)
    before = read_layers(model)
    assert kinds(model) == was
    unfold(model)
    after = read_layers(model)
    assert [(i.name, i.shape, i.parameters, i.tensors, i.obstacle) for i in before] == [
        (i.name, i.shape, i.parameters, i.tensors, i.obstacle) for i in after
    ]
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert {i.name for i in before if i.is_linear} == linears


def conv_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Conv1D(6, 4), "b": nn.Sequential(Conv1D(5, 6)), "c": Conv1D(3, 5)})


def test_a_transposed_weight_is_not_copied() -> None:
    model = conv_model()
    weight, x = model["a"].weight, torch.randn(2, 4)
    expected = model["a"](x)
    unfold(model)
    linear = model["a"]
    assert type(linear) is nn.Linear and (linear.in_features, linear.out_features) == (4, 6)
    assert linear.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(linear.weight, weight.T)
    torch.testing.assert_close(linear(x), expected)
    fold(model)
    assert model["a"].weight.data_ptr() == weight.data_ptr()


def test_only_what_holds_a_named_layer() -> None:
    model = conv_model()
    with unfolded(model, ["a", "b.0"]):
        assert [type(model[name]) for name in "ac"] == [nn.Linear, Conv1D]
        assert type(model["b"][0]) is nn.Linear
        replace_module(model, "a", nn.Identity())  # as a quantized layer would
    assert type(model["a"]) is nn.Identity
    assert isinstance(stands_for(model["a"]), Conv1D)
    assert type(model["b"][0]) is Conv1D


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = float_model("mixtral")
    was = kinds(model)
    with pytest.raises(KeyError), unfolded(model):
        raise KeyError
    assert kinds(model) == was


def test_folded_for_a_while() -> None:
    model = conv_model()
    unfold(model, ["a", "b.0"])
    with folded(model):
        assert all(type(m) is Conv1D for m in (model["a"], model["b"][0], model["c"]))
    assert [type(m) for m in (model["a"], model["b"][0], model["c"])] == [
        nn.Linear,
        nn.Linear,
        Conv1D,
    ]


def test_hooks_and_mode_go_along() -> None:
    model, seen = conv_model().train(), []
    handle = model["a"].register_forward_hook(lambda *_: seen.append(1))
    unfold(model)
    model["a"](torch.randn(2, 4))
    assert seen == [1] and model["a"].training
    fold(model)
    model["a"](torch.randn(2, 4))
    handle.remove()
    model["a"](torch.randn(2, 4))
    assert seen == [1, 1]


def test_one_module_under_two_names() -> None:
    conv = Conv1D(4, 4)
    model = nn.ModuleDict({"a": conv, "b": conv})
    unfold(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"]
    fold(model)
    assert type(model["a"]) is Conv1D and model["a"] is model["b"]


def test_a_shared_weight_keeps_a_module_from_it() -> None:
    model = conv_model()
    model["d"] = Conv1D(3, 5)
    model["d"].weight = model["c"].weight
    reasons = {info.name: info.obstacle for info in read_layers(model)}
    assert reasons["a"] is None
    assert reasons["c"] == reasons["d"] == "its weight is shared with another module"
    unfold(model)
    assert type(model["c"]) is Conv1D and type(model["a"]) is nn.Linear
