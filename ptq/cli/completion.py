"""Print a script that completes ptq's commands, options, configs and schemes in a shell.

It holds the commands of this version: make it anew after an update.
"""

import argparse

import shtab

from ptq.command import command_parser, run_command
from ptq.presets import PRESETS

EPILOG = """to install it, once:
  bash  ptq completion bash > ~/.local/share/bash-completion/completions/ptq
  zsh   ptq completion zsh > DIR/_ptq     where DIR is in $fpath, before compinit
  fish  ptq completion fish > ~/.config/fish/completions/ptq.fish"""

_NAMES = " ".join(PRESETS)
COMPLETE = {
    "CONFIG": shtab.glob("*.yaml", "*.yml"),
    "FILE": shtab.FILE,
    "DIR": shtab.DIRECTORY,
    "SCHEME": {**shtab.cmd(f"echo {_NAMES}"), "fish": f"(string split ' ' '{_NAMES}')"},
}
"""What completes an argument, by the last word of its metavar."""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EPILOG, prog)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.cli import parser as whole

    script = shtab.complete(_completed(whole(complete=True)), options.shell)
    return run_command(lambda: print(script))


def _completed(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, its arguments marked as shtab wants it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _completed(below)
        elif isinstance(action.metavar, str):
            kind = action.metavar.rpartition("_")[2]
            if kind in COMPLETE:
                action.complete = COMPLETE[kind]  # type: ignore[attr-defined]
    return parser
