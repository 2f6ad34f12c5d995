"""The script that writes a random checkpoint, and a streamed run on what it wrote."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

import ptq
from ptq.config import as_config
from ptq.modules import quantized_layers
from ptq.pipeline import run
from ptq.report import Console
from tests.test_scripts import script

SIZES = ["--layers=3", "--hidden=32", "--intermediate=64", "--heads=4", "--kv-heads=2",
         "--vocab=97"]  # fmt: skip


@pytest.fixture
def module() -> ModuleType:
    return script("make_random_checkpoint")


@pytest.mark.parametrize("untied", [False, True])
def test_it_is_a_model_of_transformers(module: ModuleType, untied: bool, tmp_path: Path) -> None:
    extra = ["--untied"] if untied else []
    assert module.main([*SIZES, "--out", str(tmp_path / "m"), *extra]) == 0
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 5
    model, tokenizer = ptq.load_float(str(tmp_path / "m"))
    assert tokenizer is None
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not untied
    assert 0.018 < model.model.layers[2].mlp.down_proj.weight.float().std().item() < 0.022
    again = str(tmp_path / "again")
    assert module.main([*SIZES, "--out", again, *extra]) == 0
    state = ptq.load_float(again)[0].state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_it_can_be_streamed(
    module: ModuleType, recipe: str, tiny_model: Path, tiny_texts: tuple[Path, Path], tmp_path: Path
) -> None:
    options = ["--out", str(tmp_path / "m"), "--tokenizer", str(tiny_model)]
    assert module.main([*SIZES, *options]) == 0
    config = {
        "model": {"id": str(tmp_path / "m"), "stream": True},
        "scheme": "w4a16-g16",
        "recipe": recipe,
        "calibration": {"data": str(tiny_texts[0]), "samples": 4, "sequence_length": 16},
        "output": str(tmp_path / "out"),
    }
    run(as_config(config), console=Console("quiet"))
    assert len(quantized_layers(ptq.load(tmp_path / "out"))) == 3 * 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--hidden=30"], "--hidden 30 is no even multiple of 4 heads"),
        (["--kv-heads=3"], "--heads 4 is no multiple of 3 kv-heads"),
        (["--vocab=50"], "at most 50 tokens"),
    ],
)
def test_mistakes(
    module: ModuleType, changed: list[str], message: str, tiny_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--out", str(tmp_path / "m"), "--tokenizer", str(tiny_model)]
    assert module.main([*SIZES, *options, *changed]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_nothing_is_overwritten(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert module.main([*SIZES, "--out", str(tmp_path)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
