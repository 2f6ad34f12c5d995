"""scripts/diagnose.py and scripts/check_diagnosis.py from the command line."""

import json
from pathlib import Path
from typing import Any

import check_diagnosis
import diagnose
import pytest
import torch
from safetensors.torch import load_file, save_file

import ptq
from ptq.pipeline import run
from ptq.report import Console
from tests.tiny import tiny_model_directory, tiny_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, a text, a recipe, and the checkpoint that it makes."""
    root = tmp_path_factory.mktemp("diagnosis")
    tiny_model_directory(root / "model")
    (root / "text.txt").write_text(tiny_text(400))
    (root / "recipe.yaml").write_text(
        f"model: {root / 'model'}\nscheme: w4a8-g16\nevaluation: {root / 'text.txt'}\n"
        f"output: {root / 'out'}\n"
    )
    run(ptq.load_config(root / "recipe.yaml", ["evaluation.context=16"]), console=Console("quiet"))
    return root


def read(directory: Path) -> Any:
    return json.loads((directory / "diagnosis.json").read_text())


def test_a_recipe_and_its_checkpoint_say_the_same(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--windows", "2", "--context", "16", "--top", "1"]
    recipe = [str(made / "recipe.yaml"), *sizes, "--output", str(tmp_path)]
    assert diagnose.main(recipe) == 0
    shown = capsys.readouterr().out
    assert "at most" in shown and "minutes" in shown and "Remedies" in shown
    checkpoint = [str(made / "out"), *sizes, "--reference", str(made / "model")]
    assert diagnose.main([*checkpoint, "--data", str(made / "text.txt")]) == 0
    a, b = read(tmp_path), read(made / "out")
    assert a["tokens_scored"] == b["tokens_scored"] == 2 * 15
    assert [x["layer"] for x in a["layers"]] == [x["layer"] for x in b["layers"]]
    assert a["layers"] == b["layers"] and a["remedies"] == b["remedies"]
    assert len(a["layers"]) == 14 and len(a["remedies"]) > 5


def test_a_damaged_checkpoint(made: Path, tmp_path: Path) -> None:
    """Its files say that they are whole; one layer's scales are those of another one."""
    model = ptq.load(made / "out")
    a, b = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (0, 1))
    a.scale = b.scale.flip(0).clone()  # type: ignore[union-attr, operator]
    ptq.save(model, tmp_path / "damaged")
    arguments = [str(tmp_path / "damaged"), "--reference", str(made / "model"), "--top", "1"]
    data = ["--data", str(made / "text.txt"), "--context", "16"]
    assert diagnose.main([*arguments, *data]) == 0
    first = read(tmp_path / "damaged")["layers"][0]
    assert first["layer"] == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}"], "is a checkpoint: name the float model with --reference"),
        (["{out}", "--reference", "{model}"], "name a text to measure on with --data"),
        (["{recipe}", "--reference", "{model}"], "--reference goes with a checkpoint"),
        (["{recipe}", "--set", "evaluation=null"], "has no evaluation section"),
        (["{recipe}", "--set", "model=null"], "key 'model' is required"),
        (["{out}", "--reference", "{model}", "--data", "x", "--set", "a=1"], "--set goes with"),
        (["{recipe}", "--output", "{out}/nowhere"], "is no directory; create it first"),
        (["{recipe}", "--context", "16", "--layers", "nothing"], "matches none of the 14"),
        (["nowhere.yaml"], "no config file at nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"out": made / "out", "model": made / "model", "recipe": made / "recipe.yaml"}
    assert diagnose.main([a.format(**names) for a in arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1 and message in error[0]


def test_check_diagnosis(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(check_diagnosis, "PLANTED", check_diagnosis.PLANTED[1:3])
    torch.manual_seed(0)
    weights = load_file(made / "model" / "model.safetensors")
    louder = {name: w * (4 if w.dim() == 2 else 1) for name, w in weights.items()}
    save_file(louder, made / "model" / "model.safetensors", {"format": "pt"})
    arguments = ["--model", str(made / "model"), "--data", str(made / "text.txt")]
    assert check_diagnosis.main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    assert "2 of 2 named first" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [x["cause"] for x in found["damages"]] == ["scale", "scale"]
