"""Draw report.html from the report.json of a run, again or for the first time.

diagnosis.json and search.json are drawn as well where they lie beside it. The page is one file
that needs no network: open it from the disk.
"""

import argparse
from pathlib import Path

from ptq.command import command_parser, run_command


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog=prog)
    parser.add_argument("directory", type=Path, metavar="DIR", help="output directory of a run")
    return parser


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.report import Console
    from ptq.report.page import report_page

    console = Console()
    console.stage_name = "draw the report"
    return run_command(lambda: console.say(report_page(options.directory)), console)
