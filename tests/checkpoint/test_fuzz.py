"""A short run of scripts/fuzz_checkpoints.py: no error but a PTQError."""

import json
import random
import shutil
from pathlib import Path

import fuzz_checkpoints
import mutations
import pytest

from ptq.report import Console


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tries", "15", "--seed", "7", "--keep", str(tmp_path / "found")]
    options = fuzz_checkpoints.parse_arguments(arguments)
    assert fuzz_checkpoints.fuzz(options, Console()) == 0
    shown = capsys.readouterr().out
    assert "15 damaged directories of 12 kinds" in shown and "0 findings" in shown
    assert "refused" in shown and "loaded" in shown


def test_an_error_that_is_none_of_ptq_is_a_finding(tmp_path: Path) -> None:
    def careless(_: Path) -> None:
        raise KeyError("a")

    came, found = fuzz_checkpoints.attempt(careless, tmp_path)
    assert came == "finding" and found is not None and "KeyError: 'a'" in found
    assert fuzz_checkpoints.attempt(lambda root: None, tmp_path) == ("loaded", None)


def test_the_damage_is_real_and_repeats(tmp_path: Path) -> None:
    """The same seed does the same damage, and most of it changes a file."""
    first = tmp_path / "first"
    first.mkdir()
    (first / "a.json").write_text(json.dumps({"a": {"b": [1, 2]}, "c": "d"}))
    (first / "b.json").write_text(json.dumps({"e": list(range(9))}))
    changed = 0
    for seed in range(20):
        texts = []
        for name in ("one", "two"):
            root = Path(shutil.copytree(first, tmp_path / name))
            mutations.damage_json(root, random.Random(seed))
            texts.append([path.read_text() for path in mutations.files_of(root)])
            shutil.rmtree(root)
        assert texts[0] == texts[1]
        changed += texts[0] != [path.read_text() for path in mutations.files_of(first)]
    assert changed > 15
