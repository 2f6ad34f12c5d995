#!/usr/bin/env python
"""Check that a checkpoint is what ptq wrote: `ptq verify`, whose code is in ptq/cli/verify.py."""

import signal
import sys

if __name__ == "__main__":  # until there is something to clean up, Ctrl-C just stops
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ptq.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
