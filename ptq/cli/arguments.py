"""Arguments that several commands share.

The metavar says what an argument is, and so what a shell completes it with (completion.py):
CONFIG a YAML file, FILE any file, DIR (or what ends so) a directory, SCHEME the name of a scheme.
"""

import argparse
import json


def add_config(parser: argparse.ArgumentParser) -> None:
    """``--config`` and what changes it."""
    parser.add_argument("--config", required=True, metavar="CONFIG", help="the YAML recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key of the recipe, as in --set calibration.samples=32; repeatable",
    )
    parser.add_argument("--scheme", metavar="SCHEME", help="short for --set scheme=SCHEME")
    parser.add_argument("--output", metavar="DIR", help="short for --set output.dir=DIR")


def overrides(options: argparse.Namespace) -> list[str]:
    """The changes that were asked for, as ``load_config`` takes them."""
    changes = list(options.overrides)
    for key, value in (("scheme", options.scheme), ("output.dir", options.output)):
        if value is not None:  # a name is a string, whatever it looks like
            changes.append(f"{key}={json.dumps(value)}")
    return changes
