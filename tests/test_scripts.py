"""The other scripts, as a user calls them."""

import dataclasses
import importlib.util
import json
import shlex
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import ptq
from ptq.algorithms import round_to_nearest
from ptq.config import preset
from ptq.kernels import KERNELS, Int4Pack, LinearSpec
from ptq.model import load_tokenizer
from tests.helpers import tiny_bert
from tests.kernels.cuda_stand_in import CudaOps
from tests.tiny import tiny_text, tiny_tokenizer

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    model, tokenizer = ptq.load_float(str(tiny_model))
    ptq.quantize(model, "w8a16")
    ptq.save(model, tmp_path / "out", tokenizer=tokenizer)
    return tmp_path / "out"


def test_evaluate_model_refuses_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ptq.load", None)
    arguments = ["nowhere", "--data", "t.txt", "--fail-if"]
    assert script("evaluate_model").main([*arguments, "kl_man > 1"]) == 2
    assert "did you mean 'kl_mean'?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert script("evaluate_model").main(["nowhere", "--tasks", "t"]) == 2
    assert "tasks are run by lm-eval, which is not installed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("evaluate_model").main(["nowhere"])
    assert "give --data, --tasks, or both" in capsys.readouterr().err


def test_evaluate_model_runs_tasks(
    checkpoint: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    arguments = [str(checkpoint), "--tasks", str(ROOT / "tests" / "evaluation" / "tasks")]
    gate = ["--fail-if", "tasks.ptq_words.items < 5"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what lm-eval's own packages warn of
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
        more = ["--items", "4", "--reference", str(tiny_model), "--json", str(figures)]
        assert script("evaluate_model").main([*arguments, *more, *gate]) == 3
        assert script("evaluate_model").main([*arguments, "--items", "2"]) == 0
    shown = capsys.readouterr()
    assert "McNemar" in shown.out
    assert "failed: tasks.ptq_words.items < 5: tasks.ptq_words.items is 4" in shown.err
    assert json.loads(figures.read_text())["tasks"]["ptq_words"]["items"] == 4


def test_evaluate_model_on_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    model, tokenizer = ptq.load_float(str(tmp_path / "bert"))
    ptq.quantize(model, "w8a16")
    ptq.save(model, tmp_path / "out", tokenizer=tokenizer)
    text = tmp_path / "sentences.txt"
    text.write_text("\n".join(tiny_text(9, seed=i) for i in range(6)))
    arguments = [str(tmp_path / "out"), "--data", str(text), "--context", "32"]
    gate = ["--fail-if", "cosine_mean < 0.9"]
    reference = ["--reference", str(tmp_path / "bert")]
    assert script("evaluate_model").main([*arguments, *reference, *gate]) == 0
    assert "Spearman" in capsys.readouterr().out
    assert script("evaluate_model").main(arguments) == 2
    assert "pass that as reference" in capsys.readouterr().err
    assert script("evaluate_model").main([*arguments, "--fail-if", "kl_mean > 1"]) == 2
    assert "no figure 'kl_mean'" in capsys.readouterr().err


def test_evaluate_model(
    checkpoint: Path,
    tiny_model: Path,
    tiny_texts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(checkpoint), "--data", str(tiny_texts[1]), "--context", "64"]
    figures = tmp_path / "figures.json"
    extra = ["--reference", str(tiny_model), "--explain", "--json", str(figures)]
    assert script("evaluate_model").main([*arguments, *extra]) == 0
    shown = capsys.readouterr().out
    assert "int8pack" in shown
    assert "perplexity" in shown
    found = json.loads(figures.read_text())
    assert found["protocol"]["context"] == 64
    gates = ["--fail-if", "kl_mean > 5", "--fail-if", "ratio_low > 0.1"]
    assert script("evaluate_model").main([*arguments, *extra, *gates]) == 3
    failed = [x for x in capsys.readouterr().err.splitlines() if x.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith("failed: ratio_low > 0.1: ratio_low is ")
    # Random weights: an int8 model is all but its float model.
    assert abs(found["ratio"] - 1) < 0.01
    assert script("evaluate_model").main(arguments) == 0
    assert "ratio" not in capsys.readouterr().out


def test_evaluate_model_mistakes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in (
        ([str(tmp_path / "nowhere"), "--data", "x.txt"], "nowhere"),
        ([str(checkpoint), "--data", "./x.txt"], "no calibration or evaluation file"),
    ):
        assert script("evaluate_model").main(arguments) == 2
        assert expected in capsys.readouterr().err


def test_bench_accuracy(
    tiny_model: Path,
    tiny_texts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--model", str(tiny_model), "--data", str(tiny_texts[1]), "--context", "64"]
    arguments += ["--calibration", str(tiny_texts[0]), "--schemes", "w8a16", "w8a8-static"]
    arguments += ["--samples", "8"]
    assert script("bench_accuracy").main([*arguments, "--json", str(figures)]) == 0
    rows = json.loads(figures.read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["w8a16", "w8a8-static"]
    shown = capsys.readouterr().out
    assert "| w8a16 | rtn | 1.0" in shown or "| w8a16 | rtn | 0.99" in shown
    assert rows[0]["kl_mean"] < rows[1]["kl_mean"]


STAND_IN = """
import json, sys
from safetensors.torch import load_file, save_file
peer, model, tokens, output = sys.argv[2:6]
rows = json.load(open(tokens))
weights = {n: w for n, w in load_file(model + "/model.safetensors").items() if "_proj" in n}
save_file({n: 0 * w if "--symmetric" in sys.argv else w for n, w in weights.items()}, output)
iterations = float(sys.argv[sys.argv.index("--iterations") + 1])
print(json.dumps({"seconds": iterations, "peak_memory_bytes": len(rows)}))
"""


def interpreter(directory: Path, program: str) -> str:
    """An executable that runs a program in place of the script that it is given."""
    (directory / "program.py").write_text(program)
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {directory / "program.py"} "$@"\n')
    python.chmod(0o755)
    return str(python)


def peer_arguments(tiny_model: Path, tiny_texts: tuple[Path, Path], peer: str) -> list[str]:
    arguments = ["--model", str(tiny_model), "--data", str(tiny_texts[1]), "--context", "64"]
    arguments += ["--calibration", str(tiny_texts[0]), "--samples", "8", "--peers", peer]
    return [*arguments, "--schemes", "w4a16-g32", "w4a16-g32-asym"]


def test_bench_accuracy_of_peers(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """A stand-in for another toolkit, which loses all weights, or none."""
    figures = tmp_path / "figures.json"
    arguments = peer_arguments(
        tiny_model, tiny_texts, f"auto-round={interpreter(tmp_path, STAND_IN)}"
    )
    arguments += ["--peer-iterations", "7"]
    assert script("bench_accuracy").main([*arguments, "--json", str(figures)]) == 0
    rows = json.loads(figures.read_text())["rows"]
    lost, kept = (row for row in rows if row["recipe"] == "auto-round (7 iterations)")
    assert kept["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert abs(lost["ratio"] - 1.0) > 1e-4
    assert (kept["seconds"], kept["peak_memory_bytes"]) == (7.0, 8)
    assert kept["tensor_bytes"] > lost["tensor_bytes"]


def test_mistakes_with_peers(
    tiny_model: Path,
    tiny_texts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = f"hqq={interpreter(tmp_path, 'import nowhere')}"
    bench = script("bench_accuracy").main
    assert bench(peer_arguments(tiny_model, tiny_texts, broken)) == 2
    assert "failed on w4a16-g32: ModuleNotFoundError" in capsys.readouterr().err
    for wrong in ("gptq=/bin/sh", "hqq=/nowhere"):
        with pytest.raises(SystemExit):
            bench(peer_arguments(tiny_model, tiny_texts, wrong))
        assert "give NAME=PYTHON" in capsys.readouterr().err


def test_bench_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    module = script("bench_kernels")
    options = ["--shapes", "64x64", "--rows", "1", "--schemes", "w8a16", "--cache-mb", "1"]
    assert module.main([*options, "--seconds", "0.01", "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())
    assert "w8a16" in capsys.readouterr().out


def test_check_cuda_tells_right_from_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    options = ["--device", "cpu", "--shapes", "64x128", "--rows", "1", "9", "--seconds", "0.01"]
    assert script("check_cuda").main([*options, "--json", str(figures)]) == 0
    rows = json.loads(figures.read_text())["rows"]
    assert {r["kernel"] for r in rows} >= {"int_mm", "int8pack", "int4pack", "dequantize"}
    for case in {(r["scheme"], r["m"]) for r in rows}:
        assert sum(r["chosen"] for r in rows if (r["scheme"], r["m"]) == case) == 1
    assert "resident" in {r["kernel"] for r in rows if r["scheme"] == "fp8"}
    assert "not checked: int4pack" not in capsys.readouterr().out
    narrow = ["--device", "cpu", "--shapes", "64x40", "--rows", "1", "--seconds", "0.01"]
    assert script("check_cuda").main([*narrow, "--schemes", "w8a16", "w8a8"]) == 0
    assert "int8pack: K=40 is not a multiple of 16" in (shown := capsys.readouterr().out)
    assert "cuda" not in shown
    right = Int4Pack.linear

    def wrong(self: Int4Pack, *rest: Any) -> Tensor:
        return right(self, *rest) * 1.5

    monkeypatch.setattr(Int4Pack, "linear", wrong)
    assert script("check_cuda").main(options) == 2
    assert "beyond the kernel's tolerance, the first of int4pack" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k.name.startswith("cuda")], ids=lambda k: k.name
)
def test_check_cuda_reaches_every_kernel_of_cuda(kernel: Any) -> None:
    """With its own schemes and shapes, on a device that has all that the kernels ask for."""
    module = script("check_cuda")
    able = dataclasses.replace(kernel, ops=CudaOps())
    reached = [
        LinearSpec.of(weight, preset(name).activations, "cuda", torch.bfloat16, module.ROWS[0])
        for name in module.SCHEMES
        for weight in [round_to_nearest(torch.randn(576, 576), preset(name).weights)]
    ]
    shapes = [tuple(map(int, text.split("x"))) for text in module.SHAPES]
    assert any(
        able.supports(dataclasses.replace(spec, n=n, k=k)) is None
        for spec in reached
        for n, k in shapes
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_check_cuda_takes_graphs_on_a_gpu_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("check_cuda").main(["--device", "cpu", "--graphs"]) == 2
    assert "CUDA graphs are for a GPU" in capsys.readouterr().err


def test_check_cuda_says_what_an_op_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("size(1) must be a multiple of 8")

    monkeypatch.setattr("ptq.kernels.IntMM.linear", refuse)
    options = ["--device", "cpu", "--schemes", "w8a8", "--shapes", "16x16", "--rows", "1"]
    assert script("check_cuda").main([*options, "--seconds", "0.01"]) == 2
    shown = capsys.readouterr()
    assert "NO          - size(1) must be a multiple of 8" in shown.out
    assert "beyond the kernel's tolerance" in shown.err


def test_check_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("check_cuda").main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*")  # of the compiler's imports
def test_the_performance_page(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every benchmark's figures are on the page, beside the command that makes them."""
    files = {name: tmp_path / f"{name}.json" for name in ("kernels", "model", "compile")}
    runs = {
        "kernels": ["--shapes", "32x64", "--schemes", "w8a8", "--rows", "1", "9",
                    "--cache-mb", "1", "--seconds", "0.01"],
        "model": ["--model", str(tiny_model), "--schemes", "w8a8", "--prefill", "4",
                  "--decode-after", "5", "--seconds", "0.01"],
        "compile": ["--model", str(tiny_model), "--schemes", "w8a8", "--head", "w8a16",
                    "--prompt", "4", "--tokens", "3", "--seconds", "0.01"],
    }  # fmt: skip
    for name, options in runs.items():
        assert script(f"bench_{name}").main([*options, "--json", str(files[name])]) == 0
    output = tmp_path / "docs" / "performance.md"
    second = tmp_path / "second.json"
    other = json.loads(files["model"].read_text()) | {"model": "another", "bases": ["float32"]}
    other["models"].append({**other["models"][-1], "name": "hqq", "packages": {"hqq": "7.8.9"}})
    other["rows"] += [{**row, "name": "hqq"} for row in other["rows"] if row["name"] == "w8a8"]
    second.write_text(json.dumps(other))
    options = [f"--kernels={files['kernels']}", f"--compile={files['compile']}"]
    options += ["--model", str(files["model"]), str(second)]
    assert script("make_performance_page").main([*options, f"--output={output}"]) == 0
    page = output.read_text()
    for name, path in files.items():
        assert f"python scripts/bench_{name}.py {shlex.join(runs[name])} --json" in page
        for row in json.loads(path.read_text())["rows"]:
            if row.get("chosen", True):
                assert f"{row['speed_over_bfloat16']:.2f}" in page
    assert "**another**" in page and "Peers: hqq 7.8.9." in page
    for model in other["models"]:
        share = model["weight_bytes"] / other["models"][1]["weight_bytes"]
        assert f"| {model['weight_bytes'] / 1e6:.1f} ({share:.2f}) |" in page
    assert "w8a8 compiled" in page
    files["model"].write_text("{")
    assert script("make_performance_page").main([*options, f"--output={output}"]) == 2
    assert "model.json" in capsys.readouterr().err
    assert output.read_text() == page


def test_accuracy_page_has_every_row(
    tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows, page = tmp_path / "accuracy.json", tmp_path / "accuracy.md"
    calibration, evaluation = map(str, tiny_texts)
    common = ["--model", str(tiny_model), "--data", evaluation, "--calibration", calibration]
    common += ["--samples", "4", "--windows", "2", "--context", "32", "--json", str(rows)]
    bench, make = script("bench_accuracy").main, script("make_accuracy_page").main
    recipes = ["--recipes", "rtn", "[{name: gptq, options: {damping: 0.02}}]"]
    assert bench([*common, "--schemes", "w4a16-g16", *recipes]) == 0
    (tmp_path / "own.yaml").write_text("scheme: w8a8\nrecipe: auto\n")
    for _ in range(2):  # the second time replaces its own row and keeps the others
        assert bench([*common, "--schemes", "--configs", str(tmp_path / "own.yaml")]) == 0
    found = json.loads(rows.read_text())["rows"]
    assert [row["recipe"] for row in found] == ["rtn", "gptq", "rotation, gptq"]
    assert make([str(rows), f"--output={page}"]) == 0
    for row in found:
        assert f"{row['ratio']:.4f}" in page.read_text()
    assert "gptq (damping 0.02)" in page.read_text()
    assert bench([*common, "--data", calibration, "--schemes", "w8a8", "--windows", "60"]) == 2
    assert "overlap" in capsys.readouterr().err
    rows.write_text("[]")
    assert make([str(rows), f"--output={page}"]) == 2


def test_tokenizer_of_a_checkpoint_is_the_models(checkpoint: Path) -> None:
    from ptq.config import ModelConfig
    from ptq.model import ModelSource

    loaded = load_tokenizer(ModelSource(str(checkpoint), None, ModelConfig(id="-")))
    assert loaded("w5 w6")["input_ids"] == tiny_tokenizer()("w5 w6")["input_ids"]


def test_bench_kv_cache(
    tiny_model: Path,
    tiny_texts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--model", str(tiny_model), "--data", str(tiny_texts[1]), "--context", "128"]
    arguments += ["--windows", "2", "--caches", "int8", "{bits: 4, window: 32, key_group_size: 32}"]
    arguments += ["--decode-after", "40", "--tokens", "2", "--seconds", "0", "--json", str(figures)]
    assert script("bench_kv_cache").main(arguments) == 0
    shown = capsys.readouterr().out
    assert "| int8 symmetric, keys per channel in groups of 64, values per token" in shown
    found = json.loads(figures.read_text())
    eight, four = found["quality"]
    # 2 layers x 2 heads of 8 channels. int8: a byte for each, and a scale for 64 keys or a value.
    assert eight["cache"]["nbytes"] == 2 * 2 * 128 * (8 + 8 / 64 + 8 + 1)
    # int4: 32 tokens in bfloat16; of the others half a byte, and two for scale and zero point.
    old = 96 * (4 + 2 * 8 / 32 + 4 + 2)
    assert four["cache"]["nbytes"] == 2 * 2 * (32 * 2 * 8 * 2 + old)
    assert eight["kl_mean"] < four["kl_mean"]
    assert [(row["name"], row["after"]) for row in found["speed"]][:2] == [
        ("bfloat16", 40), ("int8", 40),
    ]  # fmt: skip


def test_evaluate_model_reads_the_quantized_cache(
    tiny_model: Path,
    tiny_texts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tokenizer = ptq.load_float(str(tiny_model))
    ptq.quantize(model, {"scheme": "w8a16", "kv_cache": "int8"})
    ptq.save(model, tmp_path / "out", tokenizer=tokenizer)
    figures = tmp_path / "figures.json"
    arguments = [str(tmp_path / "out"), "--data", str(tiny_texts[1]), "--context", "64"]
    assert script("evaluate_model").main([*arguments, "--json", str(figures)]) == 0
    assert "read from the quantized cache" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["kv_cache"]["cache"]["tokens"] == 64
    assert found["kv_cache"]["perplexity"] != found["perplexity"]
