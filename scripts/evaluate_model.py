#!/usr/bin/env python
"""Measure a ptq checkpoint: `ptq evaluate`, whose code is in ptq/cli/evaluate.py."""

import signal
import sys

if __name__ == "__main__":  # until there is something to clean up, Ctrl-C just stops
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ptq.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
