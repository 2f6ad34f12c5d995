"""The model card, and what push_to_hub gives the hub."""

import copy
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils
from transformers.utils import hub

import ptq
from ptq.checkpoint import (
    assert_same,
    card_text,
    convert,
    declare_quantized,
    read_manifest,
    save,
    verify_files,
)
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


@pytest.mark.parametrize(
    ("layout", "scheme", "needs"),
    [
        ("compressed-tensors", "w8a8", "compressed-tensors"),
        ("gptq", "w4a16-g16", "optimum gptqmodel"),
        ("awq", "w4a16-g16-asym", "gptqmodel"),
    ],
)
def test_the_card_in_another_format(tmp_path: Path, layout: str, scheme: str, needs: str) -> None:
    """Says how it is loaded, and has the base and the scheme; it is verified as it was before."""
    model = quantize_linears(tiny_llama(), scheme)
    model.config._name_or_path = "someone/tiny-llama"
    save(model, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "it", layout, engine="transformers")
    card = ModelCard.load(tmp_path / "it/README.md")
    assert card.data.base_model == "someone/tiny-llama"
    assert card.data.tags == ["ptq", "quantized", layout, scheme]
    assert f"`pip install transformers {needs}`" in card.text and "import ptq" not in card.text
    assert f"| 14 QuantLinear | `{scheme}` |" in card.text
    assert "Whether vLLM loads them was not checked" in card.text
    assert is_own_card(tmp_path / "it/README.md")


def test_figures_of_a_converted_checkpoint(tmp_path: Path) -> None:
    """They are those of the source, and the card says so, and what was rounded since."""
    out, line = measured_checkpoint(tmp_path)
    convert(out, tmp_path / "ct", "compressed-tensors", engine="transformers", scales="keep")
    convert(tmp_path / "ct", tmp_path / "back", "ptq")
    for name in ("ct", "back"):
        text = (tmp_path / name / "README.md").read_text()
        assert line in text and text.count("that this one was converted from.") == 1, name
    half = ptq.load(out)
    half.to(torch.bfloat16)
    save(half, tmp_path / "half")
    assert "Perplexity" not in (tmp_path / "half/README.md").read_text()
    assert "license: mit" in (tmp_path / "ct/README.md").read_text()


def test_figures_of_rounded_scales(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(dtype=torch.bfloat16), "w8a16")
    save(model, tmp_path / "a")
    whose = read_manifest(tmp_path / "a").identity
    found = {"kind": "encoder", "cosine": 0.5}
    card = card_text(model, report={"evaluation": found}, identity=whose)
    (tmp_path / "a/README.md").write_text(card)
    convert(tmp_path / "a", tmp_path / "ct", "compressed-tensors", engine="transformers")
    text = (tmp_path / "ct/README.md").read_text()
    assert "converted from; scales rounded to bfloat16" in text and "| cosine | 0.5 |" in text


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

    @property
    def card(self) -> str:
        return self.files["README.md"].decode()

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub; what was uploaded is its repository's card from then on."""
    fake = Hub()

    def load(*_: Any, **__: Any) -> ModelCard:
        if "README.md" not in fake.files:
            raise EntryNotFoundError("none yet")
        return ModelCard(fake.files["README.md"].decode())

    monkeypatch.setattr(hub, "hf_api", lambda: fake)
    monkeypatch.setattr(modeling_utils, "hf_api", lambda: fake)
    monkeypatch.setattr(hub.ModelCard, "load", load)
    return fake


def test_push_to_hub(tmp_path: Path, fake: Hub) -> None:
    """What is uploaded loads again, bit for bit, and its card says what ptq.save's says."""
    model = quantize_linears(tiny_llama(), "w8a8")
    model.config._name_or_path = "org/float"
    save(model, tmp_path / "a")
    loaded = ptq.load(tmp_path / "a")
    assert isinstance(loaded, PreTrainedModel)
    loaded.push_to_hub("me/tiny")
    for name, content in fake.files.items():
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(content)
    assert {"config.json", "model.safetensors", "README.md"} <= fake.files.keys()
    card = (tmp_path / "a/README.md").read_text()
    assert "base_model: org/float" in card and "| 14 QuantLinear | `w8a8` |" in card
    assert fake.card == card
    assert_same(model, ptq.load(tmp_path / "hub"))


def measured_checkpoint(tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint with figures in its card, and the line that has them."""
    source = tiny_model_directory(tmp_path / "float")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    (tmp_path / "text.txt").write_text(tiny_text(300))
    out = tmp_path / "out"
    config = {
        "model": str(source),
        "scheme": "w8a8",
        "evaluation": {"data": str(tmp_path / "text.txt"), "windows": 2, "context": 64},
        "output": str(out),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = ptq.run(tmp_path / "config.json").sections["evaluation"]
    return out, f"Perplexity ratio {found['ratio']:.4f} [{found['ratio_low']:.4f},"


@pytest.mark.parametrize("reader", [ptq.load, AutoModelForCausalLM.from_pretrained])
def test_measured_figures_are_pushed(tmp_path: Path, fake: Hub, reader: Any) -> None:
    """Of the tensors that they were measured of, also from a copy, and of no others."""
    out, line = measured_checkpoint(tmp_path)
    reader(out).push_to_hub("me/tiny")
    assert fake.card == (out / "README.md").read_text() and line in fake.card
    model = copy.deepcopy(reader(out))
    model.save_pretrained(tmp_path / "again", push_to_hub=True)
    assert fake.card == (tmp_path / "again/README.md").read_text() and line in fake.card
    save(model, tmp_path / "saved")
    assert line in (tmp_path / "saved/README.md").read_text()
    model.model.layers[0].mlp.up_proj.scale.mul_(2)
    model.push_to_hub("me/tiny")
    assert "Perplexity" not in fake.card and "`w8a8`" in fake.card


def test_a_card_on_the_hub(fake: Hub) -> None:
    """Of a user it stays; one of ptq is replaced; tags are added to either."""
    model = quantize_linears(tiny_llama(), "w8a8")
    declare_quantized(model)
    model.push_to_hub("me/tiny", tags=["mine"])
    assert ModelCard(fake.card).data.tags == ["ptq", "quantized", "w8a8", "mine"]
    other = quantize_linears(tiny_llama(), "w8a16")
    declare_quantized(other)
    other.push_to_hub("me/tiny")
    assert "`w8a16`" in fake.card and "`w8a8`" not in fake.card
    assert {"mine", "w8a16"} <= set(ModelCard(fake.card).data.tags or [])
    fake.files["README.md"] += b"And what I have to say.\n"
    model.push_to_hub("me/tiny")
    assert "And what I have to say." in fake.card and "| 14 QuantLinear | `w8a16` |" in fake.card
    fake.files["README.md"] = b"mine"
    model.push_to_hub("me/tiny")
    assert ModelCard(fake.card).text.strip() == "mine"


def test_a_dequantized_model_is_pushed_as_a_float_one(fake: Hub) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    declare_quantized(model)
    model.push_to_hub("me/tiny")
    ptq.dequantize(model)
    fake.files.clear()
    model.push_to_hub("me/tiny")
    assert "w8a8" not in fake.card.split("---")[2]


def test_a_model_that_was_saved_can_be_pickled(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    declare_quantized(model)
    model.save_pretrained(tmp_path / "a")
    assert_same(model, pickle.loads(pickle.dumps(model)))
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_a_card_does_not_publish_where_a_model_was(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a16")
    model.config._name_or_path = str(tmp_path)
    assert str(tmp_path) not in card_text(model)
    config = as_config({"scheme": "w8a16", "model": str(tmp_path)})
    text = card_text(model, config)
    assert f"`{tmp_path.name}`" in text and str(tmp_path) not in text
    model.config._name_or_path = "org/name"
    assert "`org/name`" in card_text(model)
