#!/usr/bin/env python
"""Draw report.html from the report.json of a run, again or for the first time.

diagnosis.json and search.json are drawn as well where they lie beside it. The page is one file
that needs no network: open it from the disk.
"""

import argparse
import sys
from pathlib import Path

from arguments import script_parser

from ptq.command import run_command
from ptq.report import Console


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="output directory of a run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    console.stage_name = "draw the report"

    def action() -> None:
        from ptq.report.page import report_page

        console.say(report_page(options.directory))

    return run_command(action, console)


if __name__ == "__main__":
    sys.exit(main())
