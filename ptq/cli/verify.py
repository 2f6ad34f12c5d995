"""Check that a checkpoint is what ptq wrote: every hash, every shape, the manifest itself.

Reads every byte, one tensor in memory at a time, and builds no model. Names each tensor and file
that is damaged, missing or left over.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ptq.command import command_parser, run_command
from ptq.errors import CheckpointError

if TYPE_CHECKING:
    from ptq.report import Console


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog=prog)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory of the checkpoint")
    return parser


def verify(directory: Path, console: "Console") -> None:
    """Print what was checked.

    Raises:
        CheckpointError: something is damaged; each problem has been printed.
    """
    from ptq.checkpoint import not_covered, read_manifest, verify_bytes

    console.stage("verify")
    problems = verify_bytes(directory)
    if problems:
        for problem in problems:
            print(f"damaged: {problem}", file=sys.stderr)
        raise CheckpointError(
            f"{directory}: {len(problems)} problems; copy what is named again from where it was "
            "written, or quantize again"
        )
    manifest = read_manifest(directory)
    files = len(manifest.shards) + len(manifest.files)
    console.say(
        f"verified   {directory}: {len(manifest.layers)} quantized layers, "
        f"{len(manifest.tensors)} tensors of {manifest.total_tensor_bytes / 1e6:,.1f} MB, "
        f"{files} files; all as written"
    )
    rest = not_covered(directory)
    if rest:
        console.say(f"note: no hash says what these were: {', '.join(rest)}")


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.report import Console

    console = Console()
    return run_command(lambda: verify(options.directory, console), console)
