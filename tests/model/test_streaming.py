"""A streamed model has the tensors of the loaded one, and says which of its files is bad."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from ptq.config import ModelConfig
from ptq.errors import ModelError, UnsupportedError
from ptq.model import ModelSource, StreamedModel, block_lists, load_model, stream_model
from tests.helpers import SIZES, tiny_llama, tiny_tokens

LAST = "model.layers.1.mlp.down_proj.weight"


def source(directory: Path, **options: object) -> ModelSource:
    return ModelSource.resolve(ModelConfig.model_validate({"id": str(directory), **options}))


def saved(model: PreTrainedModel, directory: Path, shard: str = "20KB") -> Path:
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def filled(streamed: StreamedModel) -> PreTrainedModel:
    streamed.fill_rest()
    return streamed.model


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter and buffer, those that no file holds too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same(made: PreTrainedModel, expected: PreTrainedModel) -> None:
    a, b = tensors(made), tensors(expected)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype, name
        assert torch.equal(a[name], tensor), name
    assert made.config.to_json_string() == expected.config.to_json_string()
    assert made.training == expected.training
    if made.can_generate():
        assert made.generation_config == expected.generation_config


def mixtral() -> PreTrainedModel:
    """On disk each expert by itself, in the model all experts of a block in one parameter."""
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    return MixtralForCausalLM._from_config(config)


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM._from_config(Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0))


def gemma() -> PreTrainedModel:
    config = Gemma3TextConfig(**SIZES, head_dim=8, num_key_value_heads=2, sliding_window=3)
    return Gemma3ForCausalLM._from_config(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama_tied": lambda: tiny_llama(tied=True),
    "mixtral": mixtral,
    "phi3": phi3,
    "gemma": gemma,
    "neox": lambda: GPTNeoXForCausalLM._from_config(GPTNeoXConfig(**SIZES)),
    "bert": lambda: BertForMaskedLM._from_config(BertConfig(**SIZES)),
}


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
@pytest.mark.parametrize("name", MODELS)
def test_the_filled_model_is_the_loaded_one(name: str, shard: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = source(saved(MODELS[name](), tmp_path, shard))
    made, expected = filled(stream_model(found)), load_model(found, bars=False)
    assert_same(made, expected)
    with torch.no_grad():
        assert torch.equal(made(tiny_tokens())[0], expected(tiny_tokens())[0])


@pytest.mark.parametrize("asked", ["auto", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtypes(asked: str, stored: torch.dtype, tmp_path: Path) -> None:
    found = source(saved(tiny_llama(dtype=stored), tmp_path), dtype=asked)
    made = filled(stream_model(found))
    assert_same(made, load_model(found, bars=False))
    wanted = stored if asked == "auto" else getattr(torch, asked)
    assert {p.dtype for p in made.parameters()} == {wanted}


def test_the_files_dtype_counts_where_the_config_has_none(tmp_path: Path) -> None:
    saved(tiny_llama(dtype=torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = source(tmp_path)
    made = filled(stream_model(found))
    assert_same(made, load_model(found, bars=False))
    assert made.dtype == torch.bfloat16


def test_a_base_models_files_serve_the_model_with_a_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    saved(LlamaModel._from_config(config), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    found = source(tmp_path)
    made = filled(stream_model(found))
    assert isinstance(made, LlamaForCausalLM)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert_same(made, load_model(found, bars=False))


def test_only_what_was_asked_for_has_values(tmp_path: Path) -> None:
    streamed = stream_model(source(saved(tiny_llama(), tmp_path)))
    (blocks,) = block_lists(streamed.model)

    def full() -> list[str]:
        return [
            block
            for block in blocks
            if not any(p.is_meta for p in streamed.model.get_submodule(block).parameters())
        ]

    assert full() == []
    assert not streamed.model.get_submodule("model.embed_tokens").weight.is_meta
    streamed.fill_layer("lm_head")
    assert full() == []
    streamed.fill_layer("model.layers.1.mlp.up_proj")
    assert full() == ["model.layers.1"]
    before = streamed.model.get_parameter(LAST)
    streamed.fill("model.layers.1")
    assert streamed.model.get_parameter(LAST) is before
    streamed.fill_rest()
    assert full() == blocks


def shard_of(directory: Path, key: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][key]


def rewrite(directory: Path, key: str, change: Callable[[Tensor], Tensor | None]) -> None:
    shard = shard_of(directory, key)
    stored = load_file(shard)
    changed = change(stored.pop(key))
    if changed is not None:
        stored[key] = changed
    save_file(stored, shard, metadata={"format": "pt"})


@pytest.mark.parametrize("key", [LAST, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_found_before_anything_is_done(key: str, tmp_path: Path) -> None:
    rewrite(saved(tiny_llama(), tmp_path), key, lambda _: None)
    with pytest.raises(ModelError, match=key):
        stream_model(source(tmp_path))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_a_late_block(value: float, tmp_path: Path) -> None:
    rewrite(saved(tiny_llama(), tmp_path), LAST, lambda t: t.index_fill(0, torch.tensor(1), value))
    streamed = stream_model(source(tmp_path))
    streamed.fill("model.layers.0")
    with pytest.raises(ModelError, match=f"tensor {LAST} has 64 NaN or Inf"):
        streamed.fill("model.layers.1")


def test_nan_outside_the_blocks(tmp_path: Path) -> None:
    rewrite(saved(tiny_llama(), tmp_path), "model.norm.weight", lambda t: t * torch.nan)
    with pytest.raises(ModelError, match=r"tensor model\.norm\.weight has 32 NaN"):
        stream_model(source(tmp_path))


def test_another_shape(tmp_path: Path) -> None:
    rewrite(saved(tiny_llama(), tmp_path), LAST, lambda t: t[:-1].contiguous())
    with pytest.raises(ModelError, match=rf"tensor {LAST} has shape \[31, 64\] .*\[32, 64\]"):
        filled(stream_model(source(tmp_path)))


def test_one_expert_is_missing(tmp_path: Path) -> None:
    saved(mixtral(), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    key = next(k for k in sorted(index["weight_map"]) if "layers.1" in k and "experts.1" in k)
    rewrite(tmp_path, key, lambda _: None)
    with pytest.raises(ModelError, match=r"tensor model\.layers\.1\.mlp\.experts"):
        filled(stream_model(source(tmp_path)))


def test_a_truncated_shard(tmp_path: Path) -> None:
    found = source(saved(tiny_llama(), tmp_path))
    shard = shard_of(tmp_path, LAST)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{shard} is not a whole safetensors file"):
        stream_model(found)


def test_a_shard_that_goes_away(tmp_path: Path) -> None:
    found = source(saved(tiny_llama(), tmp_path))
    streamed = stream_model(found)
    shard = shard_of(tmp_path, LAST)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=shard.name):
        filled(streamed)
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        stream_model(found)


def test_a_broken_index(tmp_path: Path) -> None:
    (saved(tiny_llama(), tmp_path) / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="is no index of safetensors files"):
        stream_model(source(tmp_path))


def test_what_cannot_be_streamed(tmp_path: Path, demo_model: str) -> None:
    with pytest.raises(UnsupportedError, match="not GGUF; set model.stream: false"):
        stream_model(ModelSource.resolve(ModelConfig(id=demo_model)))
    tiny_llama().config.save_pretrained(tmp_path / "empty")
    with pytest.raises(UnsupportedError, match="neither model.safetensors nor"):
        stream_model(source(tmp_path / "empty"))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    model = ResNetForImageClassification._from_config(config)
    with pytest.raises(UnsupportedError, match="no list of blocks"):
        stream_model(source(saved(model, tmp_path / "resnet")))


def test_tensors_that_the_model_does_not_have_are_said(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path)
    shard = shard_of(tmp_path, LAST)
    save_file(load_file(shard) | {"model.extra": torch.ones(1)}, shard, metadata={"format": "pt"})
    said: list[str] = []
    stream_model(source(tmp_path), said.append)
    assert len(said) == 1
    assert "model.extra" in said[0]
