"""Run a benchmark of the repository: scripts/bench_NAME.py, with the arguments that follow.

The benchmarks are scripts beside the package, not a part of it: they are here in a clone of the
repository (pip install -e), and not in a wheel. Without NAME, those that are here are listed. To
measure the kernels for one checkpoint, which needs no repository: ptq explain DIR --tune.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import ptq
from ptq.command import command_parser, run_command
from ptq.errors import ConfigError

SCRIPTS = Path(ptq.__file__).parent.parent / "scripts"


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "example:\n  ptq bench model --seconds 8", prog)
    parser.add_argument("name", metavar="NAME", nargs="?", help="kernels, model, accuracy, ...")
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help="for the benchmark")
    return parser


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    here = {p.stem.removeprefix("bench_"): p for p in sorted(SCRIPTS.glob("bench_*.py"))}

    def check() -> None:
        if not here:
            raise ConfigError(
                f"no benchmarks at {SCRIPTS}: they come with a clone of the repository, not with a "
                "wheel; ptq explain DIR --tune measures the kernels for a checkpoint"
            )
        if options.name is None:
            print("\n".join(here))
        elif options.name not in here:
            raise ConfigError(f"no benchmark {options.name!r}; there are {', '.join(here)}")

    failed = run_command(check)
    if failed or options.name is None:
        return failed
    command = [sys.executable, str(here[options.name]), *options.rest]
    return subprocess.run(command, check=False).returncode
