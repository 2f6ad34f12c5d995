#!/usr/bin/env python
"""Convert a checkpoint to another format: `ptq convert`, whose code is in ptq/cli/convert.py."""

import signal
import sys

if __name__ == "__main__":  # until there is something to clean up, Ctrl-C just stops
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ptq.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
