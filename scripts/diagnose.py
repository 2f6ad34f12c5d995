#!/usr/bin/env python
"""Which layers damage a quantized model: `ptq diagnose`, whose code is in ptq/cli/diagnose.py."""

import signal
import sys

if __name__ == "__main__":  # until there is something to clean up, Ctrl-C just stops
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ptq.cli.diagnose import main

if __name__ == "__main__":
    sys.exit(main())
