"""The command ``ptq``: its commands, what it says to mistakes, and what it does not load."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ptq
from ptq.cli import COMMANDS, bench, main, parser

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = {
    "quantize_model": "quantize",
    "evaluate_model": "evaluate",
    "convert_checkpoint": "convert",
    "verify_checkpoint": "verify",
}


def python(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **options},
    )  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tiny_model}\nscheme: w8a16\noutput: {tmp_path / 'out'}\n")
    return path


def test_every_command_is_a_module_and_every_module_a_command() -> None:
    modules = {p.stem for p in (ROOT / "ptq" / "cli").glob("*.py")}
    assert modules - {"__init__", "arguments"} == set(COMMANDS)


def test_help_and_mistakes_load_neither_torch_nor_pydantic() -> None:
    """So they take a tenth of a second, not three; the parsers of all commands included."""
    code = (
        "import sys; from ptq.cli import parser\n"
        "text = parser().format_help() + parser(complete=True).format_help()\n"
        "print([m for m in ('torch', 'transformers', 'pydantic', 'yaml') if m in sys.modules])"
    )
    found = python("-c", code)
    assert found.stdout.strip() == "[]", found.stderr


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: ptq {name}")
        assert "exit codes:" in shown
        assert f"{name} " in parser().format_help() and text in parser().format_help()


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"ptq {ptq.__version__}\n"
    assert main([]) == 0
    assert "commands" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantise"], "no command 'quantise'; did you mean 'quantize'?"),
        (["zzz", "--help"], "no command 'zzz'; commands: "),
        (["--verbose"], "unrecognized arguments: --verbose"),
        (["quantize"], "the following arguments are required: --config"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
    ],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_is_its_command(script: str) -> None:
    found = importlib.import_module(script)
    assert found.main is importlib.import_module(f"ptq.cli.{SCRIPTS[script]}").main
    shown = python(str(ROOT / "scripts" / f"{script}.py"), "--help").stdout
    assert shown.startswith(f"usage: {script}.py ")


def test_from_the_config_to_the_kernels(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(recipe)]
    out = tmp_path / "out"
    assert main(["plan", *config, "--scheme", "w4a16-g32", "--full-plan"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown and "w4a16-g32" in shown
    assert not out.exists()
    assert main(["quantize", *config, "--scheme", "w8a8", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["verify", str(out)]) == 0
    assert "all as written" in capsys.readouterr().out
    assert main(["explain", str(out)]) == 0
    assert "w8a8" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["quantize", *config]) == 2
    assert "overwrite" in capsys.readouterr().err


def test_explain_can_measure(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["quantize", "--config", str(recipe), "--quiet"]) == 0
    asked = {}

    def tune(_: object, **options: object) -> str:
        asked.update(options)
        return "measured"

    monkeypatch.setattr("ptq.tuning.tune", tune)
    assert main(["explain", str(tmp_path / "out"), "--tune", "--memory", "1.1"]) == 0
    assert asked["memory"] == 1.1
    assert "measured" in capsys.readouterr().out


def test_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench"]) == 0
    assert {"kernels", "model", "accuracy"} <= set(capsys.readouterr().out.split())
    assert main(["bench", "modle"]) == 2
    assert "no benchmark 'modle'; there are " in capsys.readouterr().err
    (tmp_path / "bench_own.py").write_text("import sys; sys.exit(len(sys.argv))")
    monkeypatch.setattr(bench, "SCRIPTS", tmp_path)
    assert main(["bench", "own", "--seconds", "8"]) == 3
    monkeypatch.setattr(bench, "SCRIPTS", tmp_path / "site-packages")
    assert main(["bench", "model"]) == 2
    assert "come with a clone of the repository" in capsys.readouterr().err


def test_python_m_ptq_and_a_reader_that_goes_away() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ptq", "completion", "bash"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 141
    assert errors == b""


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completions")
    made = {}
    for shell in ("bash", "zsh", "fish"):
        found = python("-m", "ptq", "completion", shell)
        assert found.returncode == 0, found.stderr
        made[shell] = folder / shell
        made[shell].write_text(found.stdout)
    return made


WORDS = [
    ("qu", {"quantize"}),
    ("quantize --dry", {"--dry-run"}),
    ("quantize --scheme w4a16-g64", {"w4a16-g64", "w4a16-g64-asym"}),
    ("quantize --config one", {"one.yaml"}),
    ("completion ", {"bash", "zsh", "fish"}),
]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(("typed", "offered"), WORDS, ids=[typed for typed, _ in WORDS])
def test_completion(
    shell: str, typed: str, offered: set[str], completions: dict[str, Path], tmp_path: Path
) -> None:
    """What the shell itself offers; of the files in a directory, those that can be a config."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for name in ("one.yaml", "one.txt", "two.yaml"):
        (tmp_path / name).touch()
    code = {
        "fish": f"source {completions[shell]}; complete -C 'ptq {typed}'",
        "bash": f"source {completions[shell]}; IFS=' ' read -ra COMP_WORDS <<< 'ptq {typed}'\n"
        + ("COMP_WORDS+=('')\n" if typed.endswith(" ") else "")
        + "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_ptq; printf '%s\\n' \"${COMPREPLY[@]}\"",
    }[shell]
    found = subprocess.run(
        [shell, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert {line.split("\t")[0] for line in found.stdout.splitlines()} == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_completion_of_zsh_is_a_script_that_zsh_reads(completions: dict[str, Path]) -> None:
    folder = completions["zsh"].with_name("fpath")
    folder.mkdir()
    shutil.copy(completions["zsh"], folder / "_ptq")
    code = f"fpath=({folder} $fpath); autoload -U compinit; compinit -u -D; print $_comps[ptq]"
    found = subprocess.run(["zsh", "-fc", code], capture_output=True, text=True, check=True)
    assert found.stdout == "_ptq\n"
    assert subprocess.run(["zsh", "-n", folder / "_ptq"], check=False).returncode == 0
    text = completions["zsh"].read_text()
    assert "--config[the YAML recipe]:CONFIG:_files -g '(*.yaml|*.yml)'" in text
