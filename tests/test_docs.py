"""The documentation: every code block is run, and the site builds.

Python blocks of a page are one session, bash blocks are the commands that a user types (carried out
in this process), YAML blocks are configs, validated and planned. They run in a directory with
``my_model`` (two blocks), ``my_text.txt`` and ``held_out.txt``. What cannot run says why:
``<!--- skip: next "reason" -->``.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import yaml
from jsonschema import Draft202012Validator
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import ptq
from ptq.cli import COMMANDS
from ptq.cli import main as command
from ptq.config import QuantizationConfig
from ptq.report import Console
from ptq.schema import config_schema

ROOT = Path(__file__).parent.parent
GENERATED = {"accuracy.md", "performance.md"}
"""Made by scripts; their blocks are the benchmarks that measured them, of minutes to hours."""
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in GENERATED]
FRONT = [ROOT / "README.md", ROOT / "FIGURES.md"]
SHOWN = {"python", "bash", "yaml", "text", ""}
"""Languages of blocks: the first three run, the others are output."""
VALIDATOR = Draft202012Validator(config_schema())


def commands(text: str) -> list[list[str]]:
    """The words of each command of a bash block."""
    joined = text.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line, comments=True))]


def carry_out(words: list[str]) -> int:
    """One command, in this process; ``> FILE`` is a redirection."""
    with contextlib.ExitStack() as stack:
        if ">" in words:
            target = words[words.index(">") + 1]
            words = words[: words.index(">")]
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(target, "w"))))
        if words[0] == "ptq":
            return command(words[1:])
        assert words[0] == "python" and words[1].startswith("scripts/"), words
        return int(importlib.import_module(Path(words[1]).stem).main(words[2:]))


def run_bash(example: Example) -> None:
    for words in commands(example.parsed):
        assert carry_out(words) == 0, words


def run_yaml(example: Example) -> None:
    """A config, or a part of one; with a model, its plan is made."""
    content = yaml.safe_load(example.parsed)
    whole = {"scheme": "w8a8", **content}
    VALIDATOR.validate(whole)
    config = QuantizationConfig.model_validate(whole)
    if config.model is not None:
        ptq.run(config, dry_run=True, console=Console("quiet"))


SYBIL = Sybil(
    parsers=[
        SkipParser(),
        PythonCodeBlockParser(),
        CodeBlockParser("bash", run_bash),
        CodeBlockParser("yaml", run_yaml),
    ],
    path=str(ROOT / "docs"),
    patterns=["*.md"],
)


@pytest.fixture
def workplace(
    tmp_path: Path, tiny_model: Path, tiny_texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    for name, target in {
        "my_model": tiny_model,
        "my_text.txt": tiny_texts[0],
        "held_out.txt": tiny_texts[1],
        "calibration_data": tmp_path / "own",
        "configs": ROOT / "configs",
    }.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "own").mkdir()  # the shipped text has no word of the tiny tokenizer
    row = json.dumps({"text": tiny_texts[1].read_text()})
    (tmp_path / "own" / "evaluation.jsonl").write_text(f"{row}\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_runs(page: Path) -> None:
    document = SYBIL.parse(page)
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            assert len(str(skipped)) > 10, f"{page.name}, line {example.line}: give the reason"


@pytest.mark.parametrize("page", [*PAGES, *FRONT], ids=lambda p: p.name)
def test_every_block_has_a_language_that_is_looked_at(page: Path) -> None:
    text = page.read_text()
    openings = re.findall(r"^ *```(.*)$", text, re.MULTILINE)[::2]
    assert set(openings) <= SHOWN
    for marker in re.findall(r"<!--.*skip.*-->", text):
        assert re.fullmatch(r'<!--- skip: next "[^"]{10,}" -->', marker), marker


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def parse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """That the options of a command are known; its work takes long, or needs other models."""
    if words[0] == "ptq":
        assert words[1] in COMMANDS, words
        importlib.import_module(f"ptq.cli.{words[1]}").parser().parse_args(words[2:])
    if words[:1] == ["python"] and words[1].startswith("scripts/"):
        module = importlib.import_module(Path(words[1]).stem)
        own = getattr(module, "parse_arguments", None)
        if own is None:
            own = importlib.import_module(module.main.__module__).parser().parse_args
        try:
            own([word.replace("PYTHON", sys.executable) for word in words[2:]])
        except SystemExit:
            raise AssertionError(f"{words}: {capsys.readouterr().err}") from None


@pytest.mark.parametrize("page", FRONT, ids=lambda p: p.name)
def test_the_commands_of_the_front_pages_are_known(
    page: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "docs").mkdir()
    found = [words for block in blocks(page, "bash") for words in commands(block)]
    assert len(found) > 15
    for words in found:
        parse(words, capsys)


def test_every_command_is_in_the_table_of_commands() -> None:
    rows = re.findall(r"^\| `ptq (\w+)`", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert set(rows) == set(COMMANDS)


def test_the_configs_of_the_readme_are_valid() -> None:
    found = blocks(ROOT / "README.md", "yaml")
    assert found
    for block in found:
        whole = {"scheme": "w8a8", **yaml.safe_load(block)}
        VALIDATOR.validate(whole)
        QuantizationConfig.model_validate(whole)


def test_the_python_of_the_readme_uses_what_there_is() -> None:
    """It is made for a model of the hub; every name of ptq in it exists."""
    for block in blocks(ROOT / "README.md", "python"):
        compile(block, "README.md", "exec")
        for name in re.findall(r"\bptq\.(\w+)", block):
            assert getattr(ptq, name)


def test_the_front_pages_have_what_the_site_takes_from_them() -> None:
    for page in PAGES:
        for file, name in re.findall(r'--8<-- "([\w.]+):(\w+)"', page.read_text()):
            text = (ROOT / file).read_text()
            assert text.count(f"[start:{name}]") == text.count(f"[end:{name}]") == 1


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a link or an anchor that leads nowhere, a name that is not there, is an error."""
    found = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    pages: dict[str, Any] = {p.name: p.read_text() for p in (tmp_path / "site").glob("*.html")}
    assert {p.with_suffix(".html").name for p in PAGES} <= set(pages)
    assert 'id="ptq.quantize"' in pages["api.html"]
    assert "vLLM's limits are checked" in pages["formats.html"].replace("&#39;", "'")
    for name, text in pages.items():  # nothing is fetched from elsewhere
        assert not re.search(r'(src|href)="https?://[^"]*\.(js|css|woff2?)"', text), name
