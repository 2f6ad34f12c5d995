"""A quantized cache in checkpoints, configurations and evaluations."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import ptq
from ptq.calibrate import TokenSet
from ptq.checkpoint import convert
from ptq.config import KVCacheConfig, load_config
from ptq.errors import CheckpointError, ConfigError, UnsupportedError
from ptq.evaluation import compare
from ptq.kv_cache import cache_settings, new_cache, quantize_cache
from ptq.report import Console
from tests.helpers import quantize_linears, tiny_llama, tiny_tokens

INT4 = {"bits": 4, "window": 6, "key_group_size": 8}
QUIET = Console("quiet")


def quantized_model() -> Any:
    return quantize_cache(quantize_linears(tiny_llama(), "w8a8"), INT4)


def section_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def test_a_checkpoint_remembers_the_cache(tmp_path: Path) -> None:
    model = quantized_model()
    settings = cache_settings(model)
    ptq.save(model, tmp_path / "ptq")
    loaded = ptq.load(tmp_path / "ptq")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "ptq")
    by_transformers.save_pretrained(tmp_path / "again")
    again = ptq.load(tmp_path / "again")
    ids = tiny_tokens(1, 20)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    for other in (loaded, by_transformers, again):
        assert cache_settings(other) == settings
        made = other.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(made, wanted)
    assert section_of(tmp_path / "ptq")["kv_cache"]["window"] == 6
    assert section_of(tmp_path / "again") == section_of(tmp_path / "ptq")
    quantize_cache(loaded, None)
    ptq.save(loaded, tmp_path / "float")
    assert "kv_cache" not in section_of(tmp_path / "float")
    assert cache_settings(ptq.load(tmp_path / "float")) is None


def test_a_model_without_its_head_is_loaded_all_the_same(tmp_path: Path) -> None:
    ptq.save(quantized_model(), tmp_path / "ptq")
    decoder = AutoModel.from_pretrained(tmp_path / "ptq")
    assert decoder(input_ids=tiny_tokens()).last_hidden_state.shape == (2, 7, 32)


def test_a_damaged_section_is_refused(tmp_path: Path) -> None:
    ptq.save(quantized_model(), tmp_path / "ptq")
    ptq.load(tmp_path / "ptq").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    found = json.loads(path.read_text())
    found["quantization_config"]["kv_cache"]["bits"] = 5
    path.write_text(json.dumps(found))
    for load in (ptq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"quantization_config.kv_cache.bits: .* 4 or 8"):
            load(tmp_path)


def test_conversion_says_that_it_leaves_the_cache_out(tmp_path: Path) -> None:
    ptq.save(quantized_model(), tmp_path / "ptq")
    notes = convert(tmp_path / "ptq", tmp_path / "ct", "compressed-tensors", engine="transformers")
    assert "left out: the quantized key-value cache, which only ptq has" in notes


def windows(count: int = 3, length: int = 60) -> TokenSet:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 97, (count, length), generator=generator)
    return TokenSet(tuple(ids), "abc", 1, ("made up",))


def test_evaluation_through_the_cache_scores_what_generation_would() -> None:
    model = quantize_cache(tiny_llama(), INT4)
    data = windows()
    found = ptq.evaluate(model, data, through_cache=True)
    losses = []
    with torch.no_grad():
        for window in data.sequences:  # token by token, as generate decodes
            cache = new_cache(model)
            for i in range(len(window) - 1):
                logits = model(input_ids=window[None, i : i + 1], past_key_values=cache).logits
                losses.append(-logits[0, 0].double().log_softmax(-1)[window[i + 1]].item())
    # Pieces of 16 tokens see some of the newest in float that a single token sees as codes.
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=5e-3)
    assert found.perplexity != ptq.evaluate(model, data).perplexity
    assert found.cache is not None
    assert found.cache.tokens == 60
    assert found.to_dict()["cache"]["bytes_per_token"] == found.cache.nbytes / 60
    assert "cache" not in ptq.evaluate(model, data).to_dict()


def test_without_a_window_evaluation_is_exactly_what_generation_reads() -> None:
    model = quantize_cache(tiny_llama(), {"bits": 8, "keys": "token"})
    window = windows(1).sequences[0]
    found = ptq.evaluate(model, windows(1), through_cache=True)
    cache, loss = new_cache(model), 0.0
    with torch.no_grad():
        for i in range(len(window) - 1):
            logits = model(input_ids=window[None, i : i + 1], past_key_values=cache).logits
            loss -= logits[0, 0].double().log_softmax(-1)[window[i + 1]].item()
    assert found.perplexity == pytest.approx(math.exp(loss / (len(window) - 1)), rel=1e-5)
    result = compare(model, windows(1), tiny_llama(), through_cache=True)
    assert result.quantized_perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert result.kl_mean > 0
    assert "of bfloat16's" in str(result)


def test_evaluation_through_a_float_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has a float cache: call ptq.quantize_"):
        ptq.evaluate(tiny_llama(), windows(), through_cache=True)


def job(model: Path, texts: tuple[Path, Path], output: Path, cache: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "scheme": "w8a16",
        "evaluation": {"data": [str(texts[1])], "windows": 2, "context": 64},
        "generation": {"prompt": "w1 w2 w3", "max_new_tokens": 4},
        "output": {"dir": str(output), "dtype": "bfloat16"},
        "kv_cache": cache,
    }


def config_file(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def test_a_run_keeps_and_measures_it(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    values = job(tiny_model, tiny_texts, tmp_path / "out", "int8")
    report = ptq.run(load_config(config_file(tmp_path, values)), console=QUIET)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["config"]["kv_cache"]["bits"] == 8
    found = written["kv_cache"]
    # 2 layers x 2 heads of 8 channels, a byte for each; a byte for the scale of a channel's keys in
    # 64 tokens, which is the context, and for that of a token's values.
    assert found["cache"]["bytes_per_token"] == 2 * 2 * (8 + 8 / 64 + 8 + 1)
    assert found["cache"]["bfloat16_bytes_per_token"] == 2 * 2 * 2 * 8 * 2
    assert found["ratio"] == pytest.approx(
        found["quantized_perplexity"] / found["float_perplexity"]
    )
    assert found["quantized_perplexity"] != written["evaluation"]["quantized_perplexity"]
    assert f"kv cache   perplexity {found['quantized_perplexity']:.3f}" in str(report)
    assert cache_settings(ptq.load(tmp_path / "out")) == KVCacheConfig(bits=8)


def test_the_yaml_forms(tmp_path: Path) -> None:
    values = {"scheme": "w8a16", "kv_cache": {"bits": 4, "window": 128}}
    found = load_config(config_file(tmp_path, values)).kv_cache
    assert found == KVCacheConfig(
        bits=4, keys="channel", key_group_size=64, symmetric=False, window=128
    )
    for wrong, message in (
        ("int3", "kv_cache: unknown kind of cache 'int3': give int8, int4"),
        ({"bit": 8}, "unknown key 'kv_cache.bit'; did you mean 'bits'"),
        ({"bits": 3}, "kv_cache.bits: input should be 4 or 8, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(config_file(tmp_path, {"scheme": "w8a16", "kv_cache": wrong}))


def test_a_run_finds_what_does_not_fit_before_it_loads_weights(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    cache = {"bits": 4, "value_group_size": 16}
    values = job(tiny_model, tiny_texts, tmp_path / "out", cache)
    with pytest.raises(UnsupportedError, match="value_group_size 16 does not divide .* 8 channels"):
        ptq.run(load_config(config_file(tmp_path, values)), dry_run=True, console=QUIET)


def test_quantize_takes_it_along() -> None:
    model: LlamaForCausalLM = tiny_llama()
    ptq.quantize(model, {"scheme": "w8a16", "kv_cache": "int8"}, console=QUIET)
    assert cache_settings(model) == KVCacheConfig(bits=8)
    assert model.config.quantization_config.to_dict()["kv_cache"]["bits"] == 8
    with pytest.raises(UnsupportedError, match="does not divide"):
        ptq.quantize(
            tiny_llama(), {"scheme": "w8a16", "kv_cache": {"bits": 8, "value_group_size": 9}},
            console=QUIET,
        )  # fmt: skip
