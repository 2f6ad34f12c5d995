"""Bias correction takes out each layer's mean error, in the order of the calls, and never does
harm."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

import ptq
from ptq.algorithms import NoOptions, round_to_nearest
from ptq.calibrate import BlockCall, BlockStream
from ptq.config import preset
from ptq.modules import quantized_layers
from ptq.refine import BlockJob, LayerState
from ptq.refine.bias_correction import correct_biases
from tests.helpers import tiny_bert, tiny_llama, tiny_tokens
from tests.refine.jobs import job

SCHEMES = ["w4a16-g16", "w3a16-asym", "w4a8-g16", "w4a8-static"]


def read(x: Tensor, scheme: str) -> Tensor:
    """What a layer with quantized activations reads, by the definition of int8 codes."""
    if "a16" in scheme:
        return x
    if "static" in scheme:
        step = 2.5 / 127.5  # of the range in tests.refine.jobs
        return (x / step).round().clamp(-128, 127) * step
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def corrected(made: BlockJob, exact: nn.Module, scheme: str) -> list[Tensor]:
    """The biases that take all mean errors out, in float64."""
    x = torch.cat(made.stream.hidden).reshape(-1, 32).double()
    biases = []
    for name in ("0", "2"):
        float_layer = exact.get_submodule(name)
        weight, xq = made.layers[name].weight.dequantize().double(), read(x, scheme)
        error = x @ float_layer.weight.double().T - xq @ weight.T
        biases.append(float_layer.bias.double() + error.mean(0))
        x = (xq @ weight.T + biases[-1]).tanh()
    return biases


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_biases_are_those_of_the_definition(scheme: str) -> None:
    made, exact = job(scheme)
    expected = corrected(made, exact, scheme)
    codes = [state.weight for state in made.layers.values()]
    (note,) = correct_biases(made, NoOptions())
    assert note.startswith("bias correction: 2 of 2 biases, error ")
    for state, bias, before in zip(made.layers.values(), expected, codes, strict=True):
        # An int8 code of the second layer's input may differ where float32 rounds otherwise.
        torch.testing.assert_close(state.linear.bias.double(), bias, rtol=0, atol=2e-5)
        assert state.weight is before
    first, last = (float(x) for x in note.split("error ")[1].split(" -> "))
    assert last < first
    assert not any(module._forward_pre_hooks for module in made.block.modules())


def test_a_layers_mean_square_falls_by_the_square_of_the_mean() -> None:
    made, exact = job("w3a16")
    state, x = made.layers["0"], torch.cat(made.stream.hidden).reshape(-1, 32)
    error = [exact[0](x) - state.linear(x)]
    correct_biases(made, NoOptions())
    error.append(exact[0](x) - state.linear(x))
    fallen = error[0].square().mean() - error[1].square().mean()
    assert float(fallen) == pytest.approx(float(error[0].mean(0).square().mean()), rel=1e-3)
    assert float(error[1].mean(0).abs().max()) < 1e-6


def test_what_does_harm_is_taken_back() -> None:
    made, _ = job("w3a16")
    made.targets[:] = [made.block(x) for x in made.stream.hidden]  # nothing is better than this
    before = copy.deepcopy(made.block.state_dict())
    (note,) = correct_biases(made, NoOptions())
    assert note == "bias correction: 0 of 2 biases, error 0 -> 0"
    for key, value in made.block.state_dict().items():
        assert torch.equal(value, before[key]), key


class Backwards(nn.Module):
    """Calls its layers in another order than it has them in; one is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.idle = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).relu())
        return y


def test_the_order_is_that_of_the_calls_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    exact = Backwards().requires_grad_(False)
    scheme = preset("w3a16")
    x = torch.randn(2, 20, 32)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 12:] = False
    biases = []
    for filler in (0.0, 1e3):
        x[0, 12:] = filler
        block, layers = copy.deepcopy(exact), {}
        for name in ("last", "first", "idle"):
            linear = block.get_submodule(name)
            codes = round_to_nearest(linear.weight, scheme.weights)
            layers[name] = LayerState(linear, linear.weight.clone(), scheme, codes)
            layers[name].show()
        stream = BlockStream(["b"], [x.clone()], [[BlockCall((), None, {})]], [mask])
        correct_biases(BlockJob(block, 0, layers, stream, [exact(x)], 0), NoOptions())
        rows = x[mask]
        given = block.first(rows).relu()
        shift = (exact.last(given) - block.last(given)).mean(0)
        torch.testing.assert_close(shift, torch.zeros(32), rtol=0, atol=1e-5)
        assert torch.equal(block.idle.bias, exact.idle.bias)
        biases.append(block.last.bias)
    assert torch.equal(*biases)


def opt() -> nn.Module:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.2,
    )  # fmt: skip
    return OPTForCausalLM._from_config(config).eval()


def data() -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens[None]} for tokens in tiny_tokens(8, 24)]


@pytest.mark.parametrize("make", [opt, tiny_bert])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8-g16", "w4a8-static"])
def test_a_model_with_biases_comes_nearer(make: Any, scheme: str) -> None:
    exact = make()
    with torch.no_grad():
        wanted = [exact(**batch)[0] for batch in data()]
    errors = []
    for recipe in (["rtn"], ["rtn", "bias_correction"]):
        model = make()
        result = ptq.quantize(model, {"scheme": scheme, "recipe": recipe}, calibration=data())
        with torch.no_grad():
            found = [model(**batch)[0] for batch in data()]
        errors.append(
            sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
        )
    assert errors[1] < 0.97 * errors[0]
    assert sum("bias correction: " in note for note in result.notes) == 2


def test_the_checkpoint_has_the_corrected_biases(tmp_path: Any) -> None:
    model = opt()
    ptq.quantize(model, {"scheme": "w3a16", "recipe": ["bias_correction"]}, calibration=data())
    ptq.save(model, tmp_path / "out")
    back = quantized_layers(ptq.load(tmp_path / "out"))
    moved = 0
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.bias, back[name].bias)
        moved += not torch.equal(layer.bias, opt().get_submodule(name).bias)
    assert moved > len(back) / 2


def test_a_model_without_biases_is_left_alone_and_it_is_said() -> None:
    model, plain = tiny_llama(), tiny_llama()
    result = ptq.quantize(
        model, {"scheme": "w3a16", "recipe": ["bias_correction"]}, calibration=data()
    )
    ptq.quantize(plain, "w3a16")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())
    assert sum("0 of 0 biases" in n and "7 layers have no bias" in n for n in result.notes) == 2
