"""assert_same_outputs: what the model computes, not only what it holds."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

from ptq.checkpoint import assert_same_outputs, load, save
from ptq.errors import CheckpointError
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


def models() -> dict[str, tuple[nn.Module, str]]:
    return {
        "llama": (tiny_llama(), "the model's outputs"),
        "bert": (tiny_bert(), "every quantized layer's outputs"),
        "vit": (ViTForImageClassification(VIT).eval(), "every quantized layer's outputs"),
        "whisper": (Whisper(WHISPER).eval(), "every quantized layer's outputs"),
        "module": (nn.Sequential(nn.Linear(32, 8)), "every quantized layer's outputs"),
    }


@pytest.mark.parametrize("name", models())
def test_text_images_sound_and_plain_modules(name: str, tmp_path: Path) -> None:
    model, compared = models()[name]
    quantize_linears(model, "w8a8")
    save(model, tmp_path / "out")
    kind = None if isinstance(model, PreTrainedModel) else nn.Sequential(nn.Linear(32, 8))
    assert assert_same_outputs(model, load(tmp_path / "out", model=kind)).startswith(compared)


@pytest.mark.parametrize("name", models())
def test_another_scheme_over_the_same_tensors_is_found(name: str) -> None:
    """The same codes and scales, but the activations are no longer quantized."""
    model, _ = models()[name]
    quantize_linears(model, "w8a8")
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "scheme"):
            module.scheme = module.scheme.model_copy(update={"activations": None})
    with pytest.raises(CheckpointError, match="computes something else"):
        assert_same_outputs(model, other)


def test_gradients_are_not_kept() -> None:
    model = quantize_linears(tiny_llama(), "w8a16")
    assert_same_outputs(model, model)
    assert torch.is_grad_enabled()
