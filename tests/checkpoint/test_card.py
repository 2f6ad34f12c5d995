"""The model card, and what push_to_hub gives the hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel
from transformers.utils import hub

import ptq
from ptq.checkpoint import assert_same, card_text, convert, save, verify_files
from ptq.checkpoint.card import is_own_card
from ptq.config import as_config
from tests.helpers import quantize_linears, tiny_bert, tiny_llama
from tests.tiny import tiny_model_directory, tiny_text


def test_the_card_of_a_saved_model(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    model.config._name_or_path = "someone/tiny-llama"
    save(model, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "someone/tiny-llama"
    assert data["base_model_relation"] == "quantized" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and "license" not in data
    assert data["tags"] == ["ptq", "quantized", "w8a8"]
    assert "| 14 QuantLinear | `w8a8` |" in card.text and "import ptq" in card.text
    assert torch.__version__ in card.text
    assert is_own_card(tmp_path / "out/README.md") and verify_files(tmp_path / "out") == []
    convert(tmp_path / "out", tmp_path / "ct", "compressed-tensors")
    assert not (tmp_path / "ct/README.md").exists()


def test_a_card_of_ones_own_is_kept(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    save(model, tmp_path / "out", extra_files={"README.md": "mine"})
    convert(tmp_path / "out", tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", "ptq")
    for name in ("out", "ct", "back"):
        assert (tmp_path / name / "README.md").read_text() == "mine"


def test_a_model_without_a_task() -> None:
    assert ModelCard(card_text(quantize_linears(tiny_bert(), "w8a8"))).data.pipeline_tag is None


def test_the_card_of_a_run(tmp_path: Path) -> None:
    """With the licence of the source, the recipe and what was measured."""
    source = tiny_model_directory(tmp_path / "float")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (tmp_path / "text.txt").write_text(tiny_text(300))
    config = {
        "model": str(source),
        "scheme": "w8a8",
        "evaluation": {"data": str(tmp_path / "text.txt"), "windows": 2, "context": 64},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = ptq.run(tmp_path / "config.json")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "mit" and card.data.base_model is None
    found = report.sections["evaluation"]
    assert f"Perplexity ratio {found['ratio']:.4f} [{found['ratio_low']:.4f}," in card.text
    assert "`[rtn]`, without data" in card.text and "2 windows of\n64 tokens" in card.text
    assert is_own_card(tmp_path / "out/README.md")


class Hub:
    """What transformers asks of the hub's API."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return type("Repo", (), {"repo_id": repo_id})

    def create_commit(self, operations: list[Any], **_: Any) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is uploaded loads again, bit for bit, and its card has the tags."""
    model = quantize_linears(tiny_llama(), "w8a8")
    save(model, tmp_path / "a")
    loaded = ptq.load(tmp_path / "a")
    assert isinstance(loaded, PreTrainedModel)
    fake = Hub()

    def no_card(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("none yet")

    monkeypatch.setattr(hub, "hf_api", lambda: fake)
    monkeypatch.setattr(ModelCard, "load", no_card)
    loaded.push_to_hub("me/tiny")
    for name, content in fake.files.items():
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(content)
    assert {"config.json", "model.safetensors", "README.md"} <= fake.files.keys()
    tags = ModelCard(fake.files["README.md"].decode()).data.tags
    assert tags is not None and {"ptq", "w8a8"} <= set(tags)
    assert_same(model, ptq.load(tmp_path / "hub"))


def test_a_card_does_not_publish_where_a_model_was(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a16")
    model.config._name_or_path = str(tmp_path)
    assert str(tmp_path) not in card_text(model)
    config = as_config({"scheme": "w8a16", "model": str(tmp_path)})
    text = card_text(model, config)
    assert f"`{tmp_path.name}`" in text and str(tmp_path) not in text
    model.config._name_or_path = "org/name"
    assert "`org/name`" in card_text(model)
