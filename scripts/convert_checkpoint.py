#!/usr/bin/env python
"""Convert a quantized checkpoint from one format to another, without dequantizing.

SRC is what ptq wrote, or a directory in the compressed-tensors format (of llm-compressor, for
example). Codes and zero points are carried over bit for bit; DST appears whole, read back and
compared, or not at all, and is never overwritten.
"""

import argparse
import sys

from arguments import script_parser

from ptq.command import positive, run_command
from ptq.report import Console


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="directory of the checkpoint")
    parser.add_argument("target", metavar="DST", help="directory to create")
    parser.add_argument("--format", required=True, choices=("compressed-tensors", "ptq"))
    parser.add_argument(
        "--engine",
        choices=("vllm", "transformers"),
        default="vllm",
        help="compressed-tensors: whose limits are checked before anything is written "
        "(default: vllm; transformers: those of the format alone)",
    )
    parser.add_argument(
        "--scales",
        choices=("model", "keep"),
        default="model",
        help="compressed-tensors: dtype of the stored scales: the model's, as its readers want it "
        "(default), or as they are",
    )
    parser.add_argument(
        "--shard-size-mb", type=positive, default=5000, help="largest shard (default: 5000)"
    )
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace, console: Console) -> None:
    from ptq.checkpoint import convert

    console.stage("convert")
    notes = convert(
        options.source,
        options.target,
        options.format,
        engine=options.engine,
        scales=options.scales,
        shard_bytes=options.shard_size_mb * 1_000_000,
    )
    for note in notes:
        console.say(f"note: {note}")
    console.say(f"written    {options.target} ({options.format}), read back, codes bit-equal")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: convert(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
