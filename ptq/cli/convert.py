"""Convert a quantized checkpoint from one format to another, without dequantizing.

SOURCE_DIR is what ptq wrote, or a directory in the compressed-tensors, GPTQ or AWQ format (of
llm-compressor, GPTQModel or AutoAWQ, for example). gptq is version 1 of that format, for symmetric
weights; gptq-v2 has any zero point. Codes and zero points are carried over bit for bit;
TARGET_DIR appears whole, read back and compared, or not at all, and is never overwritten.
"""

import argparse
from typing import TYPE_CHECKING

from ptq.command import command_parser, positive, run_command

if TYPE_CHECKING:
    from ptq.report import Console

FORMATS = ("ptq", "compressed-tensors", "gptq", "gptq-v2", "awq")


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog=prog)
    parser.add_argument("source", metavar="SOURCE_DIR", help="directory of the checkpoint")
    parser.add_argument("target", metavar="TARGET_DIR", help="directory to create")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--engine",
        choices=("vllm", "transformers"),
        default="vllm",
        help="whose limits are checked before anything is written, in a format of other toolkits "
        "(default: vllm; transformers: not those of vllm)",
    )
    parser.add_argument(
        "--scales",
        choices=("model", "keep"),
        default="model",
        help="dtype of the stored scales in a format of other toolkits: what its readers compute "
        "with (default; the model's, or float16 for GPTQ and AWQ), or as they are",
    )
    parser.add_argument(
        "--shard-size-mb", type=positive, default=5000, help="largest shard (default: 5000)"
    )
    return parser


def convert(options: argparse.Namespace, console: "Console") -> None:
    from ptq.checkpoint import convert

    console.stage("convert")
    notes = convert(
        options.source,
        options.target,
        options.format,
        engine=options.engine,
        scales=options.scales,
        shard_bytes=options.shard_size_mb * 1_000_000,
        verify="process",
    )
    for note in notes:
        console.say(f"note: {note}")
    console.say(f"written    {options.target} ({options.format}), read back, codes bit-equal")
    console.say("verified   a fresh process loads it and computes the same bits")


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.report import Console

    console = Console()
    return run_command(lambda: convert(options, console), console)
