"""Predictions against what real runs of tiny models write and hold, and the check of memory."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PretrainedConfig,
)

from ptq.config import as_config
from ptq.errors import ConfigError
from ptq.model import load_model_config
from ptq.model.skeleton import skeleton
from ptq.pipeline import run
from ptq.planning import plan
from ptq.preflight import (
    Facts,
    Rates,
    Source,
    Stage,
    available_bytes,
    check_memory,
    checkpoint_bytes,
    compared,
    facts_of,
    memory_stages,
    predict,
    time_terms,
)
from ptq.recipe import make_recipe
from ptq.report import Console, Report
from tests.tiny import tiny_tokenizer


def config_of(directory: Path, texts: tuple[Path, Path], **changes: Any) -> Any:
    return as_config({
        "model": str(directory),
        "scheme": "w8a8",
        "calibration": {"data": str(texts[0]), "samples": 4, "sequence_length": 32},
        "output": str(directory.parent / "out"),
        **changes,
    })  # fmt: skip


def quiet(config: Any) -> Report:
    return run(config, console=Console("quiet"))


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "w4a16-g32-asym"},
        {"scheme": "w8a8-static"},
        {"scheme": "w8a8", "output": {"dir": "out", "dtype": "bfloat16"}},
        {"scheme": "w4a16-g32", "embeddings": "w8a16"},
        {"scheme": "w8a8", "recipe": ["rotation", "gptq"]},
        {"scheme": "w8a8", "recipe": ["residual_rotation", "gptq"], "tied_embeddings": "untie"},
        {"scheme": "w8a16", "tied_embeddings": "untie", "rules": [
            {"layers": "lm_head", "scheme": "w4a16-g32"}]},
        {"scheme": "w8a16", "output": {"dir": "out", "shard_size_mb": 1}},
    ],
)  # fmt: skip
def test_the_size_is_exact(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = dict(changes)
    output = changes.pop("output", {})
    config = config_of(
        tiny_model, tiny_texts, output=output | {"dir": str(tmp_path / "out")}, **changes
    )
    preflight = quiet(config).sections["preflight"]
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert preflight["checkpoint_bytes"] == written
    assert preflight["error_percent"]["checkpoint_bytes"] == 0


def test_the_size_of_several_files_and_of_unfolded_layers(
    tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=9000, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    out = {"dir": str(tmp_path / "out"), "shard_size_mb": 1}
    preflight = quiet(config_of(tmp_path / "gpt2", tiny_texts, output=out)).sections["preflight"]
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert preflight["checkpoint_bytes"] == sum(p.stat().st_size for p in files)


SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}


def facts(model_config: PretrainedConfig | None = None, **changes: Any) -> Facts:
    """Of a Llama large enough for its terms to be told apart, on the meta device."""
    model_config = model_config or LlamaConfig(**SIZES)
    config = as_config({
        "model": "x", "scheme": "w8a8", "output": "out",
        "calibration": {"data": "t.txt", "samples": 8, "sequence_length": 64, "batch_size": 4},
        **changes,
    })  # fmt: skip
    empty = skeleton(model_config, torch.float32)
    recipe = make_recipe(config.recipe, config.scheme)
    made = plan(empty, config, dtype=torch.float32)
    return facts_of(empty, model_config, made, recipe, config, Source(gguf=False), torch.float32)


def stages(given: Facts) -> dict[str, Stage]:
    return {stage.name: stage for stage in memory_stages(given, 100)}


def test_facts() -> None:
    found = facts()
    shapes = {(x.shape, x.inside): x.count for x in found.linears}
    assert shapes == {
        ((256, 256), True): 8,
        ((128, 256), True): 8,
        ((512, 256), True): 8,
        ((256, 512), True): 4,
        ((1000, 256), False): 1,
    }
    assert (found.blocks, found.hidden, found.heads, found.kv_heads) == (4, 256, 8, 4)
    assert (found.head_dim, found.inner, found.vocabulary) == (32, 512, 1000)
    assert found.block_elements == 2 * 65536 + 2 * 32768 + 3 * 131072
    assert found.largest == 256_000


def test_memory_has_what_a_stage_holds() -> None:
    float_bytes = facts().float_bytes
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert float_bytes == 4 * sum(p.numel() for p in model.parameters())
    evaluated = stages(facts(evaluation={"data": "e.txt", "context": 128}))
    assert evaluated["evaluate float"].terms["logits of two windows"] == 2 * 128 * 1000 * 4
    assert evaluated["evaluate float"].terms["float model"] == float_bytes
    assert "evaluate float" not in stages(facts())
    read = stages(facts(scheme="w4a16-g64"))["read back"].terms
    forms = read["kernels' forms of the weights"]
    assert read["the model read back"] == facts(scheme="w4a16-g64").quantized_bytes + forms
    static = stages(facts(scheme="w8a8-static"))["quantize"].terms
    assert static["logits of a calibration batch"] == 4 * 64 * 1000 * 4
    learned = facts(scheme="w4a16-g64", recipe=["gptaq", "learned_rounding"])
    terms = stages(learned)["quantize"].terms
    assert terms["hidden states of 8 sequences, 2 times"] == 2 * 8 * 64 * 256 * 4
    assert terms["learned rounding: rounding, codes, gradients"] == 32 * learned.block_elements
    turned = facts(recipe=["residual_rotation", "rtn"], tied_embeddings="untie")
    terms = stages(turned)["quantize"].terms
    assert terms["the output head's own weight"] == 4 * model.lm_head.weight.numel()
    streamed = stages(facts(model={"id": "x", "stream": True}))
    assert streamed["quantize"].total < stages(facts())["quantize"].total
    totals = [stage.total for stage in streamed.values()]
    assert all(total > 100 for total in totals)


def test_texts_that_are_shorter_than_they_may_be() -> None:
    given = facts(scheme="w8a8-static")
    assert given.padded_batches == ((4, 64), (4, 64))
    counted = dataclasses.replace(given, lengths=(3, 9, 4, 4, 20, 1))
    assert counted.padded_batches == ((4, 9), (2, 20))
    assert counted.calibration_tokens == 41
    terms = stages(counted)["quantize"].terms
    assert terms["logits of a calibration batch"] == 2 * 20 * 1000 * 4


RATES = Rates(
    tokens=64,
    linear={(256, 256): (64.0, 1.0), (128, 256): (64.0, 1.0), (512, 256): (64.0, 1.0),
            (256, 512): (64.0, 1.0), (1000, 256): (640.0, 1.0)},
    quantized={((256, 256), "w8a8"): (32.0, 1.0), ((128, 256), "w8a8"): (32.0, 1.0),
               ((512, 256), "w8a8"): (32.0, 1.0), ((256, 512), "w8a8"): (32.0, 1.0)},
    rounding={"w8a8": 1e-3},
    attention=0.0, statistics=0.0, observing=0.0, checking=0.0,
    element=0.0, hashing=0.0, streaming=0.0, small=0.0,
)  # fmt: skip


def test_time_is_what_is_counted_times_what_each_piece_takes() -> None:
    given = facts(evaluation={"data": "e.txt", "windows": 3, "context": 64})
    terms = time_terms(given, RATES)
    # 28 layers, one second a token each, and the head's ten; quantized layers take half.
    assert terms["evaluate float"] == pytest.approx(3 * 64 * (28 + 10))
    assert terms["evaluate quantized"] == pytest.approx(3 * 64 * (14 + 10))
    assert terms["quantize"] == pytest.approx(1.2e-3 * 4 * given.block_elements)
    assert "calibrate" not in terms
    assert "generate float" not in terms


def test_time_of_learned_rounding_whatever_comes_after_it() -> None:
    def quantizing(*recipe: Any) -> float:
        given = facts(scheme="w8a8", recipe=["gptq", *recipe])
        return time_terms(given, RATES)["quantize"]

    def learned(iterations: int) -> dict[str, Any]:
        return {"name": "learned_rounding", "options": {"iterations": iterations, "sequences": 1}}

    assert quantizing(learned(200)) > quantizing(learned(100)) > quantizing()
    grown = quantizing(learned(200)) - quantizing(learned(100))
    after = quantizing(learned(200), "distill") - quantizing(learned(100), "distill")
    assert after == pytest.approx(grown)
    assert quantizing(learned(100), "distill") > quantizing(learned(100))


def test_time_of_the_verifying_process() -> None:
    """It starts, and four runs of a token (29 layers of a second each) show that it is right."""
    rates = dataclasses.replace(RATES, small=1e-6, hashing=1e-9)

    def verifying(**changes: Any) -> float:
        return time_terms(facts(**changes), rates)["verify"]

    files = verifying(output={"dir": "out", "verify": "files"})
    assert files == pytest.approx(2e-9 * facts().quantized_bytes)
    streamed = verifying(model={"id": "x", "stream": True}) - files
    assert 1 < streamed < 20  # what starting takes, at a microsecond an operation
    assert verifying() - files - streamed == pytest.approx(4 * 29, rel=0.01)


def test_an_expert_sees_its_share_of_the_tokens() -> None:
    mixture = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    given = facts(mixture, evaluation={"data": "e.txt", "windows": 1, "context": 64})
    seen = {x.shape: (x.count, x.share) for x in given.linears}
    assert seen[1024, 256] == (4 * 8, 0.25)
    assert seen[256, 512] == (4 * 8, 0.25)
    assert seen[256, 256] == (4 * 2, 1.0)
    once = (64.0, 1.0)
    linear = dict.fromkeys(seen, once)
    quantized = {(shape, "w8a8"): once for shape in seen}
    terms = time_terms(given, dataclasses.replace(RATES, linear=linear, quantized=quantized))
    # A token passes four attentions of four layers, two of eight experts of two, and the head.
    assert terms["evaluate float"] == pytest.approx(64 * (4 * (4 + 2 * 2) + 1))


def test_a_prediction_and_its_errors() -> None:
    made = predict(facts(), 1_000_000, 500_000_000, 2.0, rates=RATES, measuring=1.0)
    text = str(made)
    assert "1.0 MB of weight files" in text
    assert "process and libraries 530.0 MB" in text
    assert made.seconds == 3.0 + sum((made.times or {}).values())
    values = made.to_dict()
    json.dumps(values)
    measured = {"checkpoint_bytes": 800_000, "seconds": values["seconds"], "peak_memory_bytes": 1}
    found = compared(values, {**measured, "cpu_seconds": 2 * values["seconds"]})
    assert found["error_percent"]["checkpoint_bytes"] == pytest.approx(25)
    assert found["error_percent"]["seconds"] == 0
    assert found["error_percent"]["cpu_seconds"] == pytest.approx(-50)
    many = predict(facts(), 1, 1, 2.0, rates=RATES, threads=2).to_dict()
    assert "cpu_seconds" not in compared(many, {"cpu_seconds": 2.0})["error_percent"]
    on_gpu = predict(facts(), 1, 1, 2.0, rates=None)
    assert on_gpu.seconds is None
    assert "for a CPU only" in str(on_gpu)
    most = predict(facts(scheme="w8a8-static"), 1, 1, 2.0, rates=None)
    assert "at most ~" in str(most)


@pytest.mark.parametrize(
    ("terms", "changes", "remedy"),
    [
        ({"float model": 10**9}, {}, "set model.stream: true"),
        ({"float model": 10**9}, {"evaluation": "e.txt"}, "stream: true, without evaluation"),
        ({"logits of a calibration batch": 10**9}, {}, "lower calibration.batch_size"),
        ({"hidden states of 8 sequences, 2 times": 10**9}, {}, "lower calibration.samples"),
        ({"logits of two windows": 10**9}, {}, "lower evaluation.context"),
        ({"what is outside": 10**9}, {"model": {"id": "x", "stream": True}}, "more memory"),
    ],
)
def test_too_little_memory(terms: dict[str, int], changes: dict[str, Any], remedy: str) -> None:
    stage = Stage("quantize", {"process and libraries": 10**8, **terms})
    given = facts(**changes)
    assert check_memory(given, stage, 10**8, 2 * 10**9) is None
    assert check_memory(given, stage, 10**8, None) is None
    warning = check_memory(given, stage, 10**8, 10**9)
    assert warning is not None
    assert remedy in warning
    with pytest.raises(ConfigError, match=r"1.0 GB of memory more in 'quantize', and 0.8 GB are"):
        check_memory(given, stage, 10**8, 8 * 10**8)


def test_available_memory(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    text = "MemTotal: 900 kB\nMemAvailable: 500 kB\nSwapFree: 100 kB\nHugePages_Total: 0\n"
    (tmp_path / "proc" / "meminfo").write_text(text)
    assert available_bytes(tmp_path) == 600 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5000\n")
    assert available_bytes(tmp_path) == 600 * 1024
    (group / "memory.max").write_text("105000\n")
    assert available_bytes(tmp_path) == 100_000


def test_a_run_that_cannot_have_its_memory_stops_before_the_weights(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq.job.planning.available_bytes", lambda: 1000)
    monkeypatch.delattr("ptq.job.produce.load_model")
    config = config_of(tiny_model, tiny_texts, output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="of memory more in"):
        quiet(config)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_predicts(tiny_model: Path, tiny_texts: tuple[Path, Path]) -> None:
    config = config_of(tiny_model, tiny_texts, scheme="w8a8-static")
    report = run(config, dry_run=True, console=Console("quiet"))
    found = report.sections["preflight"]
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] == max(
        sum(t.values()) for t in found["memory_bytes"].values()
    )
    assert found["text_counted"] is False
    assert "measured" not in found
    assert yaml.safe_dump(found)


def test_the_report_of_a_run_says_how_far_it_was(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    report = quiet(config_of(tiny_model, tiny_texts, scheme="w8a8-static", output=out))
    found = report.sections["preflight"]
    assert found["text_counted"] is True
    measured = found["measured"]
    assert measured["seconds"] == report.sections["resources"]["seconds"]
    assert measured["peak_memory_bytes"] > 0
    one = torch.get_num_threads() == 1
    pairs = {
        "peak_memory_bytes": "peak_memory_bytes",
        "cpu_seconds" if one else "seconds": "seconds",
    }
    for name, key in pairs.items():
        expected = 100 * (found[key] - measured[name]) / measured[name]
        assert found["error_percent"][name] == pytest.approx(expected)
    line = next(line for line in str(report).splitlines() if line.startswith("predicted "))
    assert "(+0.0%)" in line
    assert ("of processor time)" in line) == one


def test_the_skeleton_of_the_tiny_model_gives_the_size(tiny_model: Path) -> None:
    from ptq.config import ModelConfig
    from ptq.model import ModelSource

    source = ModelSource.resolve(ModelConfig(id=str(tiny_model)))
    empty = skeleton(load_model_config(source))
    made = plan(empty, "w8a8")
    whole = checkpoint_bytes(empty, made, torch.float32, 10**9)
    assert whole > made.bytes_after
    assert (whole - made.bytes_after) % 8 == 0
