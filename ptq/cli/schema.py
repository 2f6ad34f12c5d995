"""Print the JSON schema of the YAML config, with which editors complete, explain and check it.

A config that begins with the line
  # yaml-language-server: $schema=ptq.schema.json
is checked as it is typed (VS Code with the YAML extension, Neovim, Helix, JetBrains). The schema of
the newest version is docs/ptq.schema.json in the repository.
"""

import argparse
import json

from ptq.command import command_parser, run_command


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    return command_parser(__doc__, "example:\n  ptq schema > ptq.schema.json", prog)


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    parser(prog).parse_args(arguments)
    from ptq.schema import config_schema

    return run_command(lambda: print(json.dumps(config_schema(), indent=2)))
