"""Running a command line: errors become one line and an exit code."""

import sys
from collections.abc import Callable

from ptq.errors import PTQError
from ptq.report import Console

EXIT_CODES = """exit codes:
  0    done; what was asked for is written and verified
  1    a bug in ptq (a traceback is shown)
  2    bad input, or the machine cannot do it (disk full): one line says what and the remedy
  130  interrupted; nothing half-written stays behind
"""


def run_command(action: Callable[[], object], console: Console) -> int:
    """Carry out ``action``; print a :class:`PTQError` or an interruption as one line."""
    try:
        action()
    except PTQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"interrupted in stage '{console.stage_name}'; nothing half-written stays behind",
            file=sys.stderr,
        )
        return 130
    return 0
