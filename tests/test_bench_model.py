"""bench_model.py as a user calls it, its peers, and what it says of memory."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import bench_model
import pytest
import torch
from llama_bench import LlamaBench
from model_turns import Turns, own_memory, weight_bytes
from peer_process import peer_methods
from racing import compared
from torch import nn

import ptq
from ptq.errors import ConfigError
from ptq.kernels import OneDnn
from ptq.modules import quantized_layers
from tests.helpers import tiny_llama, tiny_tokens

SHORT = ["--seconds", "0.01", "--prefill", "4", "8", "--decode-after", "5"]


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    figures = tmp_path / "figures.json"
    assert bench_model.main([*SHORT, "--json", str(figures), *arguments]) == 0
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def executable(path: Path, program: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    return path


def test_every_model_has_every_figure(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, "--model", str(tiny_model), "--schemes", "w8a16")
    names = ["bfloat16", "float32", "w8a16"]
    assert [(row["task"], row["name"]) for row in found["rows"]] == [
        (task, name) for task in ("prefill 4", "prefill 8", "decode") for name in names
    ]
    assert all(row["speed_over_float32"] > 0 for row in found["rows"])
    assert all(r["speed_over_bfloat16"] == 1 for r in found["rows"] if r["name"] == "bfloat16")
    sizes = {model["name"]: model["weight_bytes"] for model in found["models"]}
    # Rotary frequencies are float32 in both.
    assert sizes["float32"] == pytest.approx(2 * sizes["bfloat16"], rel=0.01)
    assert sizes["w8a16"] < sizes["bfloat16"]
    assert all(model["load_seconds"] > 0 for model in found["models"])
    assert "prefill 8" in capsys.readouterr().out


def test_random_weights_tuned_with_a_quantized_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = partial(ptq.tune, rows=(1, 8), seconds=0.01, cache=False)
    monkeypatch.setattr(ptq, "tune", short, raising=False)
    arguments = ["--random", "tiny", "--schemes", "w8a8", "--head", "w8a16", "--tune", "1.1"]
    found = run(tmp_path, *arguments, "--bases", "bfloat16")
    assert [model["name"] for model in found["models"]] == ["bfloat16", "w8a8"]
    assert all("speed_over_float32" not in row for row in found["rows"])
    layers = found["models"][1]["tuning"]["layers"]
    assert any("lm_head" in group["names"] for group in layers)
    assert found["command"].endswith("--bases bfloat16")


def test_recipes_of_one_scheme_take_turns(tmp_path: Path) -> None:
    arguments = ["--random", "tiny", "--bases", "bfloat16", "--schemes", "w8a8", "--recipes"]
    found = run(tmp_path, *arguments, "rtn", "[residual_rotation, rtn]")
    names = ["bfloat16", "w8a8", "w8a8 residual_rotation, rtn"]
    assert [model["name"] for model in found["models"]] == names


def test_quantized_embeddings_shared_with_the_head(tmp_path: Path) -> None:
    arguments = ["--random", "tiny", "--schemes", "w8a16", "--bases", "bfloat16"]
    float_one, without = run(tmp_path, *arguments)["models"]
    _, quantized = run(tmp_path, *arguments, "--embeddings", "w8a16")["models"]
    table = 96 * 64  # of bfloat16 before; int8, a float32 scale a row, and the head's kernel now
    saved = without["weight_bytes"] - quantized["weight_bytes"]
    assert table - 96 * (4 + 6) <= saved <= table - 96 * 4
    assert quantized["weight_bytes"] < float_one["weight_bytes"]


def test_a_peer_takes_turns_in_its_own_process(tmp_path: Path) -> None:
    """The float model as a peer, in this environment: it is the model in process, but for noise."""
    peer = f"float={sys.executable}"
    found = run(tmp_path, "--random", "tiny", "--schemes", "--bases", "bfloat16", "--peers", peer)
    inside, outside = found["models"]
    assert outside["name"] == "float"
    assert outside["packages"]["torch"] == torch.__version__
    assert outside["weight_bytes"] == inside["weight_bytes"]
    assert outside["load_seconds"] > 0
    assert [r["name"] for r in found["rows"] if r["task"] == "decode"] == ["bfloat16", "float"]
    assert found["command"].endswith("--peers float=PYTHON")


STAND_IN = """
import json, os, sys
print(json.dumps({"load_seconds": 7.5, "packages": {"hqq": "9.9"}}), flush=True)
for line in sys.stdin:
    open(os.path.dirname(sys.argv[0]) + "/log", "a").write(line)
    kind, tokens = line.split()
    if tokens == "8" and "%s" in sys.argv:
        sys.exit("OutOfCandles: none left")
    print({"prefill": 0.5, "decode": 0.25, "weights": 123}[kind], flush=True)
"""


def test_what_a_peer_says_is_what_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = executable(tmp_path / "python", STAND_IN % "hqq-w4a16-g64")
    arguments = ["--random", "tiny", "--schemes", "--bases", "bfloat16", "--peers"]
    found = run(tmp_path, *arguments, f"hqq-w8a16-g64={python}")
    wanted = {"prefill 4": 500, "prefill 8": 500, "decode": 250}
    for row in found["rows"]:
        if row["name"] == "hqq-w8a16-g64":
            assert row["milliseconds"] == pytest.approx(wanted[row["task"]])
    peer = {"name": "hqq-w8a16-g64", "load_seconds": 7.5, "weight_bytes": 123,
            "packages": {"hqq": "9.9"}}  # fmt: skip
    assert found["models"][1] == peer
    asked = (tmp_path / "log").read_text().splitlines()
    assert list(dict.fromkeys(asked)) == ["prefill 4", "prefill 8", "decode 5", "weights 0"]
    assert len(asked) >= 3 * 7 + 1
    assert bench_model.main([*SHORT, *arguments, f"hqq-w4a16-g64={python}"]) == 2
    assert "hqq-w4a16-g64" in (shown := capsys.readouterr().err)
    assert "failed: OutOfCandles: none left" in shown


def test_peers_by_toolkit_and_by_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert [m for m, _ in peer_methods("torchao=/bin/sh")] == ["torchao-w8a8", "torchao-w8a16"]
    assert peer_methods("quanto-w4a16=/bin/sh") == [("quanto-w4a16", Path("/bin/sh"))]
    for wrong in ("gptq=/bin/sh", "hqq=/nowhere", "hqq"):
        with pytest.raises(SystemExit):
            bench_model.main(["--peers", wrong])
        assert "give NAME=PYTHON" in capsys.readouterr().err


LLAMA = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["-r"] == "1" and options["-o"] == "json" and options["-t"].isdecimal()
ns = 1000 * int(options["-p"]) + 70 * int(options["-n"]) + int(options.get("-d", 0))
row = {"avg_ns": ns, "model_size": 77, "build_number": 5, "build_commit": "abc"}
print(json.dumps([row] if options["-m"].endswith(".gguf") else "no model"))
"""


def test_llama_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in that answers what it was asked, in the JSON of llama.cpp."""
    binary = executable(tmp_path / "llama-bench", LLAMA)
    bench = LlamaBench(binary, tmp_path / "x-Q8_0.gguf")
    assert bench.turn("prefill", 512) == pytest.approx(512e-6)
    steps = 8
    assert bench.turn("decode", 128) == pytest.approx((70 + 128 / steps) * 1e-9)
    arguments = ["--random", "tiny", "--schemes", "--bases", "bfloat16"]
    more = ["--llama-bench", str(binary), "--gguf", str(tmp_path / "x-Q8_0.gguf")]
    found = run(tmp_path, *arguments, *more)
    wanted = {"name": "llama.cpp x-Q8_0", "load_seconds": None, "weight_bytes": 77,
              "packages": {"llama.cpp": "5 (abc)"}}  # fmt: skip
    assert found["models"][1] == wanted
    assert bench_model.main([*SHORT, *arguments, *more[:2]]) == 2
    assert "go together" in capsys.readouterr().err
    for wrong in (binary, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="llama.cpp of 2025 or newer"):
            LlamaBench(wrong, tmp_path / "model.bin")


def test_decoding_is_always_behind_as_many_tokens() -> None:
    model = tiny_llama()
    turns = Turns(model, 9)
    for _ in range(3):
        assert turns("decode", 9) > 0
        assert turns("prefill", 4) > 0
        assert turns.caches[9].get_seq_length() == 9


def test_weight_bytes_count_shared_memory_once_and_the_kernels_forms() -> None:
    layer = nn.Linear(16, 8, bias=False)
    assert weight_bytes(nn.ModuleList([layer, layer])) == 16 * 8 * 4
    tied = nn.Linear(16, 8, bias=False)
    tied.weight = nn.Parameter(layer.weight.detach())
    assert weight_bytes(nn.ModuleList([layer, tied])) == 16 * 8 * 4
    model = nn.Sequential(nn.Linear(64, 32))
    ptq.quantize(model, "w8a8")
    canonical = 64 * 32 + 32 * 4 + 32 * 4  # codes, scale, bias
    assert weight_bytes(model) == canonical
    quantized = quantized_layers(model)["0"]
    with torch.no_grad():
        quantized.run(torch.randn(3, 64), OneDnn())
    packed = 64 * 32 + 32 * 8  # codes, int64 zero points; the scale is shared
    assert weight_bytes(model) == canonical + packed


class Wrapped(torch.Tensor):
    """As toolkits do: a tensor that holds others."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapped":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any, kwargs: Any = None) -> Any:
        return args[0] if "detach" in str(func) else NotImplemented


def test_weight_bytes_look_into_tensors_that_wrap_others() -> None:
    layer = nn.Linear(16, 8, bias=False)
    layer.weight = nn.Parameter(Wrapped(torch.zeros(8, 16, dtype=torch.int8)), requires_grad=False)
    assert weight_bytes(layer) == 16 * 8


def test_own_memory_keeps_values_and_ties(tmp_path: Path) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path)
    model, _ = ptq.load_float(tmp_path)
    with torch.no_grad():
        expected = model(tiny_tokens()).logits
        own_memory(model)
        assert torch.equal(model(tiny_tokens()).logits, expected)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    if sys.platform == "linux":
        assert str(tmp_path) not in Path(f"/proc/{os.getpid()}/maps").read_text()


def test_the_spread_lies_within_what_was_seen() -> None:
    found = compared({"a": [1.0, 2.0, 9.0], "b": [1.0, 1.0, 1.0]}, "b", ("a",))
    low, high = found["spread_over_a"]
    assert 1.0 <= low <= found["speed_over_a"] == 2.0 <= high <= 9.0
