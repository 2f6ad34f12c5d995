"""Before a checkpoint appears, a fresh process has loaded it and computed the same bits."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptq
from ptq.checkpoint import fresh, save, verify_bytes
from ptq.checkpoint.atomic import Siblings
from ptq.checkpoint.fresh_child import answer
from ptq.checkpoint.fresh_messages import Reply, Request
from ptq.errors import CheckpointError, ConfigError
from ptq.kernels import Reference
from tests.helpers import quantize_linears, tiny_bert, tiny_llama

UP = "model.layers.0.mlp.up_proj"


class Own(nn.Module):
    """A class that no other process can import by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def saved(model: nn.Module, target: Path) -> str:
    """What was verified, in words."""
    said: list[str] = []
    save(model, target, verify="process", say=said.append)
    assert verify_bytes(target) == []
    return said[0]


def refused(model: nn.Module, target: Path, pattern: str) -> None:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        save(model, target, verify="process")
    assert "\n" not in str(caught.value)
    assert os.listdir(target.parent) == []


@pytest.mark.fresh_process
def test_a_real_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a process of its own, wherever it starts, and neither standard input nor output."""
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the working directory ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    model = quantize_linears(tiny_llama(dtype=torch.bfloat16), "w4a16-g32-asym")
    said = saved(model, tmp_path / "out/a")
    assert said.startswith("every byte by its hash, and the outputs of the model and of every")
    assert said.endswith("in a fresh process")


@pytest.mark.fresh_process
def test_what_the_process_finds_wrong(tmp_path: Path) -> None:
    request = fresh._request(tmp_path, quantize_linears(tiny_llama(), "w8a8"), "model")
    reply = fresh._ask(request)
    assert reply.error is not None and "is not a ptq checkpoint" in reply.error


def test_a_process_that_dies_or_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (tmp_path / "it").mkdir()
    model = quantize_linears(tiny_bert(), "w8a16")
    for script, pattern in (
        ("echo one >&2; echo 'killed by the system' >&2; exit 9", "ended with 9: killed by the"),
        (None, "cannot be started .*verify='files' needs none"),
    ):
        python = tmp_path / "python"
        python.unlink(missing_ok=True)
        if script is not None:
            python.write_text(f"#!/bin/sh\n{script}\n")
            python.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(python))
        refused(model, tmp_path / "it/out", pattern)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (tiny_llama(), "outputs of the model and of every quantized layer for fixed tokens, in"),
        (tiny_bert(), "every quantized layer's outputs for a fixed input, in a fresh"),
        (Own(), "not those of the whole, as Own is not a class of transformers"),
    ],
    ids=["decoder", "encoder", "module"],
)
def test_how_much_is_compared(model: nn.Module, words: str, tmp_path: Path) -> None:
    quantize_linears(model, "w8a8")
    assert words in saved(model, tmp_path / "out")


def test_quantized_embeddings_with_a_tied_head(tmp_path: Path) -> None:
    """In a class of its own the layers are built one by one, the head from the table's tensors."""

    class Mine(type(tiny_llama())):  # type: ignore[misc]
        pass

    model = tiny_llama(tied=True)
    ptq.quantize(model, {"scheme": "w8a16", "embeddings": "w8a16"})
    assert "fixed tokens" in saved(model, tmp_path / "a")
    model.__class__ = Mine
    assert "as Mine is not" in saved(model, tmp_path / "b")


def test_too_little_memory_for_a_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "free_bytes", lambda device: 1_000_000)
    asked: list[Request] = []
    ask = fresh._ask
    monkeypatch.setattr(fresh, "_ask", lambda request: (asked.append(request), ask(request))[1])
    said = saved(quantize_linears(tiny_llama(), "w8a8"), tmp_path / "out")
    assert "no outputs, as a second copy of the model needs 0.6 GB of memory and 0.0 GB" in said
    assert [request.scope for request in asked] == ["tensors"]


def test_measured_kernels_are_those_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its bits would differ: another kernel adds in another order, or rounds the input."""
    model = quantize_linears(tiny_llama(), "w8a16")
    model.get_submodule(UP).tune("cpu", torch.float32, ((1, Reference()),))
    assert "fixed tokens" in saved(model, tmp_path / "out")
    monkeypatch.setattr(fresh, "_tuned", lambda model: {})
    (tmp_path / "it").mkdir()
    refused(model, tmp_path / "it/out", rf"layer {UP} computes something else in a fresh process")


def test_another_output_of_one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer that differs is named, and nothing appears."""
    model = quantize_linears(tiny_llama(), "w8a8")
    original = answer

    def ask(request: Request) -> Reply:
        reply = original(request)
        where = [name for name, _ in reply.outputs].index(f"layer {UP}")
        reply.outputs[where:] = [(name, "0" * 64) for name, _ in reply.outputs[where:]]
        return reply

    monkeypatch.setattr(fresh, "_ask", ask)
    refused(model, tmp_path / "out", rf"layer {UP} computes something else in a fresh process")


def test_outputs_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")

    def ask(request: Request) -> Reply:
        reply = answer(request)
        return Reply(outputs=reply.outputs[:-1], computed=reply.computed)

    monkeypatch.setattr(fresh, "_ask", ask)
    refused(model, tmp_path / "out", r"\d+ outputs in memory, \d+ in a fresh process")


def test_a_computed_buffer_that_a_cast_has_changed(tmp_path: Path) -> None:
    """No file holds rotary frequencies; in a new process they are float32 again."""
    model = quantize_linears(tiny_llama(), "w8a8").to(torch.bfloat16)
    refused(model, tmp_path / "out", r"tensor model\.rotary_emb\.inv_freq, which is computed and")


@pytest.mark.parametrize("how", ["files", "process"])
def test_a_disk_that_changes_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    from ptq.checkpoint import native_write

    write = native_write.write_manifest

    def written(manifest: Any, directory: Path) -> None:
        write(manifest, directory)
        path = directory / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(native_write, "write_manifest", written)
    with pytest.raises(CheckpointError, match=r"tensor \S+ in \S+model\.safetensors is damaged"):
        save(quantize_linears(tiny_llama(), "w8a8"), tmp_path / "out", verify=how)
    assert os.listdir(tmp_path) == []


def test_the_old_checkpoint_stays_when_the_new_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    save(quantize_linears(tiny_llama(), "w8a8"), target, extra_files={"which": "old"})
    monkeypatch.setattr(fresh, "_ask", lambda request: Reply(error="tensor x is damaged"))
    with pytest.raises(CheckpointError, match="does not load in a fresh process: tensor x is"):
        save(quantize_linears(tiny_llama(), "w4a16"), target, overwrite=True, verify="process")
    assert (target / "which").read_text() == "old" and verify_bytes(target) == []
    assert os.listdir(tmp_path) == ["out"]
    assert not Siblings(target, "").tmp.exists()


def test_a_word_that_is_no_choice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="verify is 'yes'; choose from files, process"):
        save(quantize_linears(tiny_llama(), "w8a8"), tmp_path / "out", verify="yes")  # type: ignore[arg-type]
