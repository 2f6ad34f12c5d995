"""Hashes of what a model computes: the same for the same model, others for any other."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

from ptq.checkpoint import load, save
from ptq.checkpoint.outputs import align_parameters, model_outputs
from ptq.modules import quantized_modules
from tests.helpers import quantize_linears, tiny_bert, tiny_llama

VIT = ViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
)
WHISPER = WhisperConfig(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    vocab_size=97,
    max_target_positions=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
    decoder_start_token_id=1,
)


def models() -> dict[str, nn.Module]:
    return {
        "llama": tiny_llama(),
        "bert": tiny_bert(),
        "vit": ViTForImageClassification(VIT).eval(),
        "whisper": Whisper(WHISPER).eval(),
        "module": nn.Sequential(nn.Linear(32, 8)),
    }


@pytest.mark.parametrize("name", models())
def test_text_images_sound_and_plain_modules(name: str, tmp_path: Path) -> None:
    model = quantize_linears(models()[name], "w8a8")
    save(model, tmp_path / "out")
    kind = None if isinstance(model, PreTrainedModel) else nn.Sequential(nn.Linear(32, 8))
    found = model_outputs(load(tmp_path / "out", model=kind))
    assert found == model_outputs(model)
    layers = {f"layer {name}" for name in quantized_modules(model)}
    assert {where for where, _ in found} - {"the model"} == layers
    assert [where for where, _ in found].count("the model") == (2 if name == "llama" else 0)


@pytest.mark.parametrize("name", models())
def test_another_scheme_over_the_same_tensors_is_found(name: str) -> None:
    """The same codes and scales, but the activations are no longer quantized."""
    model = quantize_linears(models()[name], "w8a8")
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "scheme"):
            module.scheme = module.scheme.model_copy(update={"activations": None})
    pairs = zip(model_outputs(model), model_outputs(other), strict=True)
    assert all(a != b for a, b in pairs)


def test_the_first_layer_that_differs_is_the_one_that_is_damaged() -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    other = copy.deepcopy(model)
    name = "model.layers.1.self_attn.o_proj"
    other.get_submodule(name).scale[0] *= 2
    pairs = zip(model_outputs(model), model_outputs(other), strict=True)
    assert next(a for a, b in pairs if a != b)[0] == f"layer {name}"


def test_the_model_is_left_as_it_was() -> None:
    model = quantize_linears(tiny_llama(), "w8a16")
    model.model.layers[1].train()
    before = [module.training for module in model.modules()]
    model_outputs(model)
    assert [module.training for module in model.modules()] == before and any(before)
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks for module in model.modules())


def test_dropout_plays_no_part() -> None:
    model = quantize_linears(tiny_bert(), "w8a16").train()
    assert model_outputs(model) == model_outputs(model)


def test_parameters_at_odd_addresses_are_moved_and_stay_shared() -> None:
    """A row times a float32 matrix at an odd address has other last bits."""
    linear, reader = nn.Linear(32, 97), nn.Linear(32, 97)
    there = torch.empty(97 * 32 + 1)[1:].view(97, 32)
    values = there.copy_(linear.weight.detach()).clone()
    linear.weight, reader.weight = nn.Parameter(there), nn.Parameter(there)
    align_parameters(nn.Sequential(linear, reader))
    assert linear.weight.data_ptr() % 64 == 0 and linear.weight.data_ptr() != there.data_ptr()
    assert reader.weight.data_ptr() == linear.weight.data_ptr()
    assert torch.equal(linear.weight, values)
    before = linear.bias.data_ptr()
    align_parameters(linear)
    assert linear.bias.data_ptr() == before
