"""Ask for a model and a goal, look at the model's shapes, and write a commented config.

Scheme and recipe are the best of what was measured for such a goal, and the comments say why. The
config is checked as by `ptq plan` before it is written; no weights are loaded. Questions whose
answers are given as options are not asked; with --yes none are.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.command import command_parser, run_command
from ptq.errors import ConfigError

if TYPE_CHECKING:
    from ptq.advice import Wishes
    from ptq.report import Console

EPILOG = """examples:
  ptq init
  ptq init --model HuggingFaceTB/SmolLM2-360M-Instruct --goal fastest --yes
  ptq init --model ./my_model --goal smallest --loss none --calibration my_text.txt --yes"""

# The same words as in ptq.advice, which loads torch (a test holds them equal).
GOALS = ("smallest", "fastest", "accurate")
LOSSES = ("none", "small", "any")
DEVICES = ("cpu", "cuda")
USES = ("generate", "read")
DEFAULTS = {
    "calibration": "calibration_data/calibration.jsonl",
    "evaluation": "calibration_data/evaluation.jsonl",
}
"""Of a clone of the repository; elsewhere the user's own text is asked for."""
NO_DATA = "none"


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    made = command_parser(__doc__, EPILOG, prog)
    made.add_argument("--model", help="hub id, directory, .gguf file or package:NAME/FILE")
    made.add_argument("--goal", choices=GOALS, help="what matters most (default: smallest)")
    made.add_argument(
        "--loss",
        choices=LOSSES,
        help="none: half a percent of perplexity at most; small: five percent (default)",
    )
    made.add_argument("--device", choices=DEVICES, help="where it will run (default: cpu)")
    made.add_argument(
        "--use",
        choices=USES,
        help="generate: writes text, a token at a time (default); read: prompts, embeddings",
    )
    texts = {"calibration": "for recipes that look at data", "evaluation": "held out"}
    for name, what in texts.items():
        made.add_argument(f"--{name}", metavar="FILE", help=f"text {what}; 'none' if there is none")
    made.add_argument("--checkpoint", metavar="DIR", help="directory that the config will create")
    made.add_argument("--output", metavar="CONFIG", help="file to write (default: ptq.yaml)")
    made.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    made.add_argument("--yes", action="store_true", help="ask nothing; take the defaults")
    return made


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.report import Console

    console = Console()
    return run_command(lambda: init(options, console), console)


def init(options: argparse.Namespace, console: "Console") -> None:
    """Ask what is not given, choose, check, write.

    Raises:
        ConfigError: an answer is missing or of no use; the file is there already.
        ModelError: there is no such model.
    """
    path = Path(options.output or "ptq.yaml")
    _check_target(path, options.overwrite)
    ask = _asker(options.yes)
    from ptq.advice import choose, config_text, look_at

    model = options.model or ask("Model", "hub id, directory, .gguf, package:NAME/FILE", None)
    console.stage_name = "look at the model"
    facts = look_at(model)
    console.say(
        f"{facts.name}: {facts.parameters / 1e6:,.0f} million parameters, "
        f"{facts.float_bytes / 1e6:,.0f} MB as loaded"
    )
    wishes = _wishes(options, model, facts.predicts, facts.reads_text, ask)
    choice = choose(wishes, facts)
    name = Path(model).stem if model.endswith(".gguf") else Path(model).name
    checkpoint = options.checkpoint or f"out/{name}-{choice.scheme}"
    text = config_text(wishes, facts, choice, checkpoint)
    sizes = _check(text)
    _write(path, text, options.overwrite)
    for line in choice.why:
        console.say(line)
    console.say(
        f"size       {sizes}\nwritten    {path}\n"
        f"next       ptq plan --config {path}\n           ptq quantize --config {path}"
    )


def _check_target(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise ConfigError(f"--output {path} is a directory; give a file such as {path}/ptq.yaml")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: there is no directory {path.absolute().parent}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; give --output ANOTHER, or --overwrite")


Ask = Callable[..., str]


def _asker(yes: bool) -> Ask:
    """Asks the terminal; or takes the defaults."""

    def given(question: str, _: str, default: str | None, *__: Any) -> str:
        if default is None:
            raise ConfigError(f"--yes asks nothing: give --{question.lower()}")
        return default

    def asked(question: str, hint: str, default: str | None, known: Iterable[str] = ()) -> str:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"standard input is no terminal, so nobody can be asked for '{question}': give "
                f"--{question.lower()}, or --model MODEL --yes for the defaults"
            )
        known = tuple(known)
        shown = f" [{default}]" if default is not None else ""
        while True:
            try:
                answer = input(f"{question} ({hint}){shown}: ").strip() or default
            except EOFError:
                raise ConfigError(f"the input ended at '{question}'; nothing was written") from None
            if answer and (not known or answer in known):
                return answer
            print(f"  give {', '.join(known)}" if known else "  an answer is needed")

    return given if yes else asked


def _wishes(
    options: argparse.Namespace, model: str, predicts: bool, reads_text: bool, ask: Ask
) -> "Wishes":
    from ptq import advice

    def pick(key: str, words: dict[Any, str], default: str) -> Any:
        hint = "; ".join(f"{word}: {text}" for word, text in words.items())
        return getattr(options, key) or ask(key.capitalize(), hint, default, words)

    goal = pick("goal", advice.GOALS, "smallest")
    use: advice.Use = "generate" if predicts else "read"
    wishes = advice.Wishes(
        model=model,
        goal=goal,
        loss=pick("loss", advice.LOSSES, "small") if goal != "accurate" else options.loss or "any",
        device=pick("device", advice.DEVICES, "cpu"),
        use=pick("use", advice.USES, use) if goal == "fastest" and predicts else options.use or use,
        calibration=_text("calibration", options, ask) if reads_text else None,
        evaluation=_text("evaluation", options, ask) if predicts and reads_text else None,
    )
    if wishes.evaluation is not None and wishes.evaluation == wishes.calibration:
        raise ConfigError(f"{wishes.evaluation} is the calibration text too")
    return wishes


def _text(key: str, options: argparse.Namespace, ask: Ask) -> str | None:
    """A source of text, or None; what is or should be here is read now."""
    from ptq.calibrate import load_documents
    from ptq.calibrate.files import SUFFIXES

    default = DEFAULTS[key] if Path(DEFAULTS[key]).is_file() else NO_DATA
    hint = "file, directory or datasets id; or none"
    answer = getattr(options, key) or ask(key.capitalize(), hint, default)
    if answer == NO_DATA:
        return None
    is_here = Path(answer).expanduser().exists()
    if is_here or answer.startswith((".", "/", "~")) or answer.endswith(SUFFIXES):
        load_documents([answer])
    return answer


def _check(text: str) -> str:
    """The sizes by the config's plan, which is made as ``--dry-run`` makes it."""
    import tempfile

    from ptq.config import load_config
    from ptq.pipeline import run
    from ptq.planning import megabytes
    from ptq.report import Console

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ptq.yaml"
        path.write_text(text, encoding="utf-8")
        # The machine that the config is for may have a GPU that this one has not.
        config = load_config(path, ["model.device=cpu"])
        plan = run(config, dry_run=True, console=Console("quiet")).sections["plan"]
    return f"{megabytes(plan['bytes_before'])} -> {megabytes(plan['bytes_after'])}"


def _write(path: Path, text: str, overwrite: bool) -> None:
    """The whole file or none; one that appeared meanwhile stays."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        if overwrite:
            part.replace(path)
        else:
            path.hardlink_to(part)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; give --output ANOTHER") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
