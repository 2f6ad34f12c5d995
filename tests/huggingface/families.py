"""Tiny random models of every family, with what they are run on."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_IMAGE = {"image_size": 16, "patch_size": 8}
_SIDES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_SEQ2SEQ = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": 97}

FAMILIES: dict[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "llama": ("AutoModelForCausalLM", lambda: transformers.LlamaConfig(**_GROUPED)),
    "qwen3": ("AutoModelForCausalLM", lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma3": (
        "AutoModelForCausalLM",
        lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8),
    ),
    "mistral": ("AutoModelForCausalLM", lambda: transformers.MistralConfig(**_GROUPED)),
    "phi3": ("AutoModelForCausalLM", lambda: transformers.Phi3Config(**_GROUPED)),
    "opt": (
        "AutoModelForCausalLM",
        lambda: transformers.OPTConfig(**_DECODER, ffn_dim=64, word_embed_proj_dim=32),
    ),
    "gpt2": (
        "AutoModelForCausalLM",
        lambda: transformers.GPT2Config(
            **_ENDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=97
        ),
    ),
    "bloom": (
        "AutoModelForCausalLM",
        lambda: transformers.BloomConfig(
            **_ENDS, hidden_size=32, n_layer=2, n_head=4, vocab_size=97
        ),
    ),
    "gpt_neox": ("AutoModelForCausalLM", lambda: transformers.GPTNeoXConfig(**_DECODER)),
    "mixtral": (
        "AutoModelForCausalLM",
        lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=4),
    ),
    "qwen3_moe": (
        "AutoModelForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **_GROUPED, head_dim=8, **_EXPERTS, moe_intermediate_size=32, mlp_only_layers=[0]
        ),
    ),
    "gpt_oss": (
        "AutoModelForCausalLM",
        lambda: transformers.GptOssConfig(
            **_GROUPED,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    ),
    "bert": ("AutoModelForMaskedLM", lambda: transformers.BertConfig(**_DECODER)),
    "roberta": ("AutoModelForMaskedLM", lambda: transformers.RobertaConfig(**_DECODER)),
    "deberta": (
        "AutoModelForMaskedLM",
        lambda: transformers.DebertaV2Config(
            **_DECODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
        ),
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        lambda: transformers.T5Config(
            **_SEQ2SEQ, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        ),
    ),
    "bart": (
        "AutoModelForSeq2SeqLM",
        lambda: transformers.BartConfig(
            **_SEQ2SEQ,
            bos_token_id=2,
            forced_eos_token_id=None,
            **_SIDES,
            max_position_embeddings=64,
        ),
    ),
    "vit": (
        "AutoModelForImageClassification",
        lambda: transformers.ViTConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
    ),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        lambda: transformers.WhisperConfig(
            **_ENDS,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
            vocab_size=97,
            num_mel_bins=8,
            **_SIDES,
            max_source_positions=8,
            max_target_positions=16,
        ),
    ),
    "clip": (
        "AutoModelForZeroShotImageClassification",
        lambda: transformers.CLIPConfig(
            text_config=_TOWER | {"vocab_size": 97, "max_position_embeddings": 16} | _ENDS,
            vision_config=_TOWER | _IMAGE,
            projection_dim=32,
        ),
    ),
    "llava": (
        "AutoModelForImageTextToText",
        lambda: transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**_TOWER, **_IMAGE),
            text_config=transformers.LlamaConfig(**_GROUPED),
            image_token_index=96,
        ),
    ),
}
"""The Auto class and the configuration of each."""


def auto_class(family: str) -> Any:
    return getattr(transformers, FAMILIES[family][0])


def float_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random weights, large enough that the output depends on every layer; in eval mode."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(family).from_config(FAMILIES[family][1](), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(0.0, 0.2)
    return model.eval()


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    kind = model.config.model_type
    images = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if model.main_input_name == "pixel_values" and kind != "llava":
        return images
    ids = torch.randint(3, 96, (2, 7), generator=generator)
    if kind == "clip":
        return {"input_ids": ids, **images}
    if kind == "llava":
        patches = torch.full((2, 4), model.config.image_token_id)
        return {"input_ids": torch.cat([patches, ids], 1), **images}
    if kind == "whisper":
        sound = torch.randn(2, 8, 16, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids[:, :3]}
    extra = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **extra}


@torch.no_grad()
def output(model: PreTrainedModel) -> torch.Tensor:
    """Of the first kind that the model gives."""
    made: torch.Tensor = model(**inputs(model))[0]
    return made
