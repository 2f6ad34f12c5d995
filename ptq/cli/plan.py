"""Show the plan of a config: every layer's scheme, or why it stays float, and its bytes.

Made from the shapes alone: no weights are loaded, and nothing is written. The same as
`ptq quantize --dry-run`.
"""

import argparse

from ptq.cli import quantize
from ptq.cli.arguments import add_config
from ptq.command import command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    made = command_parser(__doc__, prog=prog)
    add_config(made)
    made.add_argument("--full-plan", action="store_true", help="one row for each layer")
    return made


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    return quantize.carry_out(options, dry_run=True)
