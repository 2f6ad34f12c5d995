"""Swapping layers in and out."""

import pytest
import torch
from torch import nn

import ptq
from ptq.modules import QuantLinear
from ptq.pipeline import quantize
from ptq.swap import dequantize
from tests.test_planning import llama


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(16, 8)})
    quantize(model, "w8a16")
    assert isinstance(model["a"], QuantLinear)
    assert model["a"] is model["b"]


def test_dequantize_gives_back_float_layers_with_the_quantized_weights() -> None:
    model = llama()
    original = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    quantize(model, "w8a16")
    layer = model.model.layers[0].mlp.up_proj
    step = layer.scale.abs().float()
    dequantize(model)
    linear = model.model.layers[0].mlp.up_proj
    assert type(linear) is nn.Linear
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    # Half a step, and the float32 rounding of x / S.
    assert ((linear.weight - original).abs() <= step * (0.5 + 1e-4)).all()


def test_dequantized_and_weight_only_models_agree() -> None:
    model = llama()
    quantize(model, "w8a16-g32-asym")  # no kernel that rounds to bfloat16
    ids = torch.arange(60).repeat(2, 1)
    with torch.no_grad():
        quantized = model(input_ids=ids).logits
        floated = dequantize(model)(input_ids=ids).logits
    assert torch.allclose(quantized, floated, atol=1e-4)


def test_an_untied_head_is_quantized_and_the_embedding_is_not_touched() -> None:
    model = llama()
    embedding = model.model.embed_tokens.weight.detach().clone()
    quantize(
        model,
        {
            "scheme": "w8a16",
            "rules": [{"layers": "lm_head", "scheme": "w8a16"}],
            "tied_embeddings": "untie",
        },
    )
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert isinstance(model.lm_head, QuantLinear)


def test_static_activations_need_data() -> None:
    with pytest.raises(ptq.CalibrationError, match="need calibration data"):
        quantize(llama(), "w8a8-static")


def test_nan_weights_are_refused_by_name_and_nothing_is_changed() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ptq.ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 NaN"):
        quantize(model, "w8a16")
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_infinite_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = float("inf")
    with pytest.raises(ptq.ModelError, match=r"0\.weight"):
        quantize(model, "w8a16")


def test_training_mode_is_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).train()
    quantize(model, "w8a16")
    assert model[0].training
