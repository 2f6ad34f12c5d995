#!/usr/bin/env python
"""Draw report.html from report.json: `ptq report`, whose code is in ptq/cli/report.py."""

import signal
import sys

if __name__ == "__main__":  # until there is something to clean up, Ctrl-C just stops
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ptq.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
