"""Running a command line: errors become one line and an exit code."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ptq.errors import GateError, PTQError

if TYPE_CHECKING:  # it loads torch, which --help need not wait for
    from ptq.report import Console

EXIT_CODES = """exit codes:
  0    done; what was asked for is written and verified
  1    a bug in ptq (a traceback is shown)
  2    bad input, or the machine cannot do it (disk full): one line says what and the remedy
  3    done, but a figure violates a condition of --fail-if: one line for each, with the figure
  130  interrupted; nothing half-written stays behind
  141  the reader of the output closed it
"""


def command_parser(
    description: str | None, epilog: str = "", prog: str | None = None
) -> argparse.ArgumentParser:
    """A parser that shows its description as it stands, and the exit codes.

    Args:
        epilog: shown before the exit codes.
        prog: the command's name (default: the script's).
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"{epilog}\n\n{EXIT_CODES}" if epilog else EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run_command(action: Callable[[], object], console: "Console | None" = None) -> int:
    """Carry out ``action``; print a :class:`PTQError` or an interruption as one line.

    Large tensors get huge pages from here on, where the system gives them on request: GPTQ of a
    layer of 1024 x 4096 takes a quarter less of a core's time, most of which went into pages of
    4 KiB. torch reads the variable when it makes its first tensor; a value that is set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        action()
    except GateError as error:
        for line in str(error).splitlines():
            print(f"failed: {line}", file=sys.stderr)
        return 3
    except PTQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f" in stage '{console.stage_name}'; {console.outcome}" if console else ""
        print(f"interrupted{where}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone, as in "... | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def positive(text: str) -> int:
    """A command-line argument that is a whole number from one up.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def output_file(text: str) -> Path:
    """A command-line argument that names a file which can be written.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory, or in one that is not there")
    return path
