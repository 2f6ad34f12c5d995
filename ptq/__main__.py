"""``python -m ptq`` is ``ptq``."""

import sys

from ptq.cli import main

sys.exit(main())
