#!/usr/bin/env python
"""Quantize a model as a YAML file says: `ptq quantize`, whose code is in ptq/cli/quantize.py."""

import signal
import sys

if __name__ == "__main__":  # until there is something to clean up, Ctrl-C just stops
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ptq.cli.quantize import main

if __name__ == "__main__":
    sys.exit(main())
