#!/usr/bin/env python
"""Search a scheme for each layer: `ptq search`, whose code is in ptq/cli/search.py."""

import signal
import sys

if __name__ == "__main__":  # until there is something to clean up, Ctrl-C just stops
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ptq.cli.search import main

if __name__ == "__main__":
    sys.exit(main())
