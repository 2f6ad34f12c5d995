#!/usr/bin/env python
"""Quantize a model as a YAML file says: plan, calibrate, quantize, save, verify, evaluate.

The model may be a hub id, a local directory, a .gguf file, or package:NAME/FILE (a file inside an
installed Python package). The checkpoint directory gets safetensors, the model's config, the
tokenizer, a manifest with hashes, and report.json with everything that was measured.
"""

import argparse
import json
import signal
import sys

if __name__ == "__main__":  # until there is something to clean up, Ctrl-C just stops
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ptq.command import EXIT_CODES, run_command
from ptq.config import PRESETS, load_config, with_conditions
from ptq.report import Console

EPILOG = f"""examples:
  python scripts/quantize_model.py --config configs/smollm2-w8a8.yaml
  python scripts/quantize_model.py --config configs/smollm2-w8a8.yaml --dry-run
  python scripts/quantize_model.py --config configs/smollm2-w4a16-g64.yaml \\
      --set model=HuggingFaceTB/SmolLM2-360M-Instruct --set output=out/smollm2-360m

schemes (or any wBaB[-gN|-tensor][-asym][-static], or the full form in YAML):
  {", ".join(PRESETS)}

{EXIT_CODES}"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key of the recipe, as in --set calibration.samples=32; repeatable",
    )
    parser.add_argument("--output", metavar="DIR", help="short for --set output.dir=DIR")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing ptq checkpoint"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and what the run will need, and stop; loads no weights",
    )
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="end with exit code 3 where the figures violate it, as in 'kl_mean > 0.05', beside "
        "evaluation.fail_if of the recipe; the checkpoint is kept; repeatable",
    )
    parser.add_argument("--full-plan", action="store_true", help="one row for each layer")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--quiet", action="store_const", const="quiet", dest="mode", help="print errors only"
    )
    mode.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="mode",
        help="print the report as JSON to standard output",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(options.mode or "normal")
    from ptq.pipeline import run

    def action() -> None:
        overrides = list(options.overrides)
        if options.output is not None:
            overrides.append(f"output.dir={json.dumps(options.output)}")
        if options.overwrite:
            overrides.append("output.overwrite=true")
        config = with_conditions(load_config(options.config, overrides), options.fail_if)
        report = run(config, dry_run=options.dry_run, full_plan=options.full_plan, console=console)
        if console.mode == "json":
            print(report.to_json())
        report.check_gate()

    return run_command(action, console)


if __name__ == "__main__":
    sys.exit(main())
