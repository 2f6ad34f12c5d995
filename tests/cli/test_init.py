"""``ptq init``: what it chooses, asks, writes, and refuses."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from ptq import advice
from ptq.advice import MEASURED, Facts, Wishes, choose, config_text, look_at
from ptq.cli import init, main
from ptq.config import load_config
from ptq.errors import ConfigError
from ptq.schema import config_schema
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parent.parent.parent
DECODER = Facts("M", True, True, 10**9, 2 * 10**9, 0.2, 64, 2048, False)
ENCODER = Facts("E", False, True, 10**8, 4 * 10**8, 0.5, 64, 512, False)
IMAGES = Facts("V", False, False, 10**8, 4 * 10**8, 0.0, 64, None, False)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in: no calibration_data."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answers(monkeypatch: pytest.MonkeyPatch, *given: str) -> list[str]:
    """A user at a terminal; the questions that are asked."""
    asked: list[str] = []
    waiting = iter(given)

    def reply(question: str = "") -> str:
        asked.append(question)
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", reply)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    return asked


def test_every_figure_is_in_the_documentation() -> None:
    """A row that has the scheme and the figure, in a table or in a sentence."""
    pages = [ROOT / "FIGURES.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    for m in MEASURED:
        figure = f"{m.figure:.4f}" if m.kind == "decoder" else f"{m.figure:g}"
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", text), m
        if m.seconds:
            assert re.search(rf"{re.escape(figure)} \[.*\| {m.seconds} \|", text), m
        for speed in (m.decode, m.prompt):
            assert speed is None or f"{speed:.2f} / " in text, m


def test_options_are_the_choices_of_the_advice() -> None:
    assert tuple(advice.GOALS) == init.GOALS
    assert tuple(advice.LOSSES) == init.LOSSES
    assert tuple(advice.USES) == init.USES
    assert tuple(advice.DEVICES) == init.DEVICES


@pytest.mark.parametrize(
    ("facts", "wishes", "scheme", "steps"),
    [
        (DECODER, {"goal": "smallest", "loss": "small"}, "w4a16-g64-asym", 3),
        (DECODER, {"goal": "smallest", "loss": "none"}, "w8a16", 1),
        (DECODER, {"goal": "smallest", "loss": "any"}, "w3a16-g64-asym", 3),
        (DECODER, {"goal": "smallest", "loss": "small", "calibration": None}, "w8a16", 1),
        (DECODER, {"goal": "smallest", "loss": "any", "calibration": None}, "w4a16-g64", 1),
        (DECODER, {"goal": "fastest", "loss": "small"}, "w4a16-g64", 3),
        (DECODER, {"goal": "fastest", "loss": "none"}, "w8a16", 1),
        (DECODER, {"goal": "fastest", "loss": "none", "use": "read"}, "w8a8", 2),
        (DECODER, {"goal": "fastest", "use": "read", "calibration": None}, "w8a8", 1),
        (DECODER, {"goal": "accurate", "calibration": None}, "w8a16", 1),
        (ENCODER, {"goal": "accurate"}, "w8a8", 2),
        (ENCODER, {"goal": "fastest", "use": "read"}, "w8a8", 2),
        (ENCODER, {"goal": "smallest"}, "w4a16-g64-asym", 1),
        (ENCODER, {"goal": "smallest", "calibration": None}, "w8a8", 1),
        (IMAGES, {"goal": "smallest"}, "w8a16", 1),
    ],
)
def test_what_is_chosen(facts: Facts, wishes: dict[str, Any], scheme: str, steps: int) -> None:
    """By hand from the tables of FIGURES.md."""
    choice = choose(Wishes(**{"model": "m", "calibration": "c.txt", **wishes}), facts)
    assert choice.scheme == scheme
    assert len(choice.steps) == steps


def test_nothing_loses_so_little() -> None:
    with pytest.raises(ConfigError, match="give --calibration FILE, or --loss small"):
        choose(Wishes("m", loss="none"), ENCODER)


def test_groups_are_those_that_the_model_can_have() -> None:
    wishes = Wishes("m", calibration="c.txt")
    small = choose(wishes, Facts("M", True, True, 10**6, 10**6, 0.0, 16, None, False))
    assert small.scheme == "w4a16-g16-asym"
    assert "Groups of 16, not 64" in " ".join(small.why)
    none = choose(wishes, Facts("M", True, True, 10**6, 10**6, 0.0, None, None, False))
    assert none.scheme == "w4a16-asym"
    assert none.embeddings is None


def test_a_model_larger_than_memory_is_streamed() -> None:
    facts = Facts("M", True, True, 10**13, 2 * 10**13, 0.01, 64, 2048, False)
    wishes = Wishes("m", calibration="c.txt", evaluation="e.txt")
    choice = choose(wishes, facts)
    text = config_text(wishes, facts, choice, "out")
    content = yaml.safe_load(text)
    assert content["model"] == {"id": "m", "stream": True}
    assert "evaluation" not in content and "generation" not in content
    assert "distill" not in content["recipe"] and "ptq search" not in text


TRICKY = ["plain/model-1.2", "a b", "yes", "12", "a: b", "#x", "ünïcode", 'q"u', "C:\\x", "0x1f"]


@pytest.mark.parametrize("name", TRICKY)
def test_names_are_read_back_as_they_are(name: str) -> None:
    wishes = Wishes(name, calibration=name, evaluation=name)
    content = yaml.safe_load(config_text(wishes, DECODER, choose(wishes, DECODER), name))
    assert content["model"] == name
    assert content["calibration"]["data"] == content["evaluation"]["data"] == name
    assert content["output"]["dir"] == name


def test_every_choice_is_a_valid_config(tmp_path: Path) -> None:
    validator = Draft202012Validator(config_schema())
    groups = (
        ("smallest", "fastest", "accurate"), ("small", "any"), ("cpu", "cuda"),
        ("generate", "read"), ("c.txt", None), (DECODER, ENCODER, IMAGES),
    )  # fmt: skip
    for goal, loss, device, use, data, facts in itertools.product(*groups):
        wishes = Wishes("m", goal, loss, device, use, data, "e.txt")
        text = config_text(wishes, facts, choose(wishes, facts), "out")
        validator.validate(yaml.safe_load(text))
        (tmp_path / "c.yaml").write_text(text)
        load_config(tmp_path / "c.yaml")
        told = goal == "smallest" and facts is DECODER and data is not None
        assert ("ptq search" in text) == told
        assert all(len(line) <= 100 for line in text.splitlines())


def test_facts(tiny_model: Path, tmp_path: Path) -> None:
    facts = look_at(str(tiny_model))
    tensors = json.loads((tiny_model / "config.json").read_text())
    embedding = tensors["vocab_size"] * tensors["hidden_size"]
    # Llama's parameters, by hand: q, o; k, v; gate, up, down; norms.
    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert facts.parameters == embedding + 2 * block + 32
    assert facts.float_bytes == 4 * facts.parameters
    assert facts.embedding_share == pytest.approx(embedding / facts.parameters)
    assert (facts.group, facts.positions) == (32, 256)
    assert facts.predicts and facts.reads_text and not facts.single_file
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=24, image_size=8, patch_size=4)
             ).save_pretrained(tmp_path / "vit")  # fmt: skip
    images = look_at(str(tmp_path / "vit"))
    assert not images.predicts and not images.reads_text
    assert images.group == 8


def test_yes_writes_a_config_that_runs(
    inside: Path, tiny_model: Path, tiny_texts: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """From nothing to a verified checkpoint, by the commands that it prints."""
    texts = ["--calibration", str(tiny_texts[0]), "--evaluation", str(tiny_texts[1])]
    assert main(["init", "--model", str(tiny_model), "--yes", *texts]) == 0
    shown = capsys.readouterr().out
    assert "ptq quantize --config ptq.yaml" in shown and "1.0208" in shown
    text = (inside / "ptq.yaml").read_text()
    assert "# The fewest bits" in text and "scheme: w4a16-g32-asym" in text
    assert "ptq search --help" in text
    quick = ["--set", "calibration.samples=4", "--set", "calibration.sequence_length=32"]
    assert main(["plan", "--config", "ptq.yaml"]) == 0
    schemes = ["--schemes", "w4a16-g32-asym", "w8a16", "--no-verify"]
    search = ["--budget", "6 bits", *schemes, "--output", "mixed.yaml"]
    assert main(["search", "--config", "ptq.yaml", *quick, *search]) == 0
    assert main(["quantize", "--config", "ptq.yaml", *quick, "--quiet"]) == 0
    report = json.loads(next(inside.glob("out/*/report.json")).read_text())
    assert report["recipe"]["steps"] == ["gptaq", "learned_rounding", "distill"]
    assert report["evaluation"]["ratio"] > 0
    assert [p.name for p in inside.iterdir() if p.name.startswith(".")] == []


def test_an_encoder(inside: Path, tiny_texts: tuple[Path, Path]) -> None:
    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=40)  # fmt: skip
    BertModel(config).save_pretrained(inside / "bert")
    tiny_tokenizer().save_pretrained(inside / "bert")
    arguments = ["--model", "./bert", "--goal", "accurate", "--yes"]
    assert main(["init", *arguments, "--calibration", str(tiny_texts[0])]) == 0
    content = yaml.safe_load((inside / "ptq.yaml").read_text())
    assert content["recipe"] == ["rotation", "gptq"]
    assert content["calibration"]["sequence_length"] == 40
    assert "evaluation" not in content


def test_questions(
    inside: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Empty answers take the default, wrong ones are asked again."""
    asked = answers(monkeypatch, "", str(tiny_model), "quickest", "fastest", "none", "", "read",
                    "", "none")  # fmt: skip
    assert main(["init"]) == 0
    names = [question.partition(" (")[0] for question in asked]
    assert names == ["Model", "Model", "Goal", "Goal", "Loss", "Device", "Use",
                     "Calibration", "Evaluation"]  # fmt: skip
    shown = capsys.readouterr().out
    assert "an answer is needed" in shown
    assert "give smallest, fastest, accurate" in shown
    content = yaml.safe_load((inside / "ptq.yaml").read_text())
    assert content["scheme"] == "w8a16"
    assert "calibration" not in content and "evaluation" not in content


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "standard input is no terminal, so nobody can be asked for 'Model'"),
        (["--yes"], "--yes asks nothing: give --model"),
        (["--model", "./nowhere", "--yes"], "nothing at"),
        (["--model", "MODEL"], "nobody can be asked for 'Goal': give --goal"),
        (["--model", "MODEL", "--yes", "--calibration", "x.txt"], "no calibration or evaluation"),
        (["--model", "MODEL", "--yes", "--output", "."], "is a directory"),
        (["--model", "MODEL", "--yes", "--output", "a/b.yaml"], "there is no directory"),
        (
            ["--model", "MODEL", "--yes", "--calibration", "TEXT", "--evaluation", "TEXT"],
            "is the calibration text too",
        ),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, inside: Path, tiny_model: Path,
    tiny_texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    words = {"MODEL": str(tiny_model), "TEXT": str(tiny_texts[0])}
    assert main(["init", *(words.get(a, a) for a in arguments)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and said in errors[0]
    assert list(inside.iterdir()) == []


def test_a_file_is_never_overwritten_unasked(
    inside: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["init", "--model", str(tiny_model), "--goal", "accurate", "--yes"]
    (inside / "ptq.yaml").write_text("mine")
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert (inside / "ptq.yaml").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert (inside / "ptq.yaml").read_text() != "mine"
    # One that appears while the user answers stays as well.
    monkeypatch.setattr(init, "_check_target", lambda *_: None)
    (inside / "ptq.yaml").write_text("mine")
    assert main(arguments) == 2
    assert [p.name for p in inside.iterdir()] == ["ptq.yaml"]
    assert (inside / "ptq.yaml").read_text() == "mine"


def test_the_user_goes_away(
    inside: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    answers(monkeypatch, str(tiny_model))
    assert main(["init"]) == 2
    assert "the input ended at 'Goal'; nothing was written" in capsys.readouterr().err

    def interrupt(_: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert main(["init", "--model", str(tiny_model)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(inside.iterdir()) == []
