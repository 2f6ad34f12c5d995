"""The command ``ptq``: one module for each of its commands.

A module has ``parser(prog)`` and ``main(arguments, prog) -> exit code``, loads nothing heavy at its
top, and is a line in COMMANDS. So ``ptq --help`` and a mistyped command answer at once.
"""

import argparse
import difflib
import importlib
import signal
import sys

import ptq
from ptq.command import command_parser

COMMANDS = {
    "init": "ask for a model and a goal, and write a commented config",
    "plan": "show what a config would do to every layer; loads no weights",
    "quantize": "quantize a model as a config says, save it, verify it, measure it",
    "evaluate": "measure a checkpoint, and its distance from the float model",
    "diagnose": "say which layers cause the damage, by what, and what helps",
    "search": "search a scheme for each layer under a budget, and write the config",
    "report": "draw report.html from the report.json of a run",
    "build": "compile ptq's own kernels for this processor, once",
    "explain": "say which kernel serves which layer of a checkpoint; measure them",
    "verify": "check every byte of a checkpoint against what was written",
    "convert": "convert a checkpoint to the format of another toolkit, or from it",
    "bench": "run a benchmark of the repository",
    "schema": "print the JSON schema of the config, for editors",
    "completion": "print a completion script for bash, zsh or fish",
}
"""Modules of this package, in the order of the work, each with what it does."""


def parser(complete: bool = False) -> argparse.ArgumentParser:
    """The parser of ``ptq`` itself.

    Args:
        complete: with the parsers of all commands below it, which a completion script needs.
    """
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    made = command_parser(
        "Post-training quantization for PyTorch: smaller and faster, measured and verified.",
        f"commands (ptq COMMAND --help says more):\n{listed}",
        "ptq",
    )
    made.add_argument("--version", action="version", version=f"ptq {ptq.__version__}")
    if not complete:
        made.add_argument("command", metavar="COMMAND", nargs="?", help="one of those below")
        return made
    below = made.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        below.add_parser(name, help=text, parents=[_module(name).parser()], add_help=False)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    if (
        arguments is None
    ):  # a process of its own: until there is work to clean up, Ctrl-C just stops
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        arguments = sys.argv[1:]
    own = parser()
    name = own.parse_args(arguments[:1]).command
    if name is None:
        own.print_help()
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"commands: {', '.join(COMMANDS)}"
        own.error(f"no command '{name}'; {hint}")
    return int(_module(name).main(arguments[1:], f"ptq {name}"))


def _module(name: str):  # type: ignore[no-untyped-def]  # a module with parser and main
    return importlib.import_module(f"ptq.cli.{name}")
