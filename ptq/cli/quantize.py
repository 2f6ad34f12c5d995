"""Quantize a model as a YAML file says: plan, calibrate, quantize, save, verify, evaluate.

The model may be a hub id, a local directory, a .gguf file, or package:NAME/FILE (a file inside an
installed Python package). The checkpoint directory gets safetensors, the model's config, the
tokenizer, a manifest with hashes, and report.json with everything that was measured.
"""

import argparse
from collections.abc import Sequence
from typing import Literal

from ptq.cli.arguments import add_config, overrides
from ptq.command import command_parser, run_command
from ptq.presets import PRESETS

EPILOG = f"""examples:
  ptq quantize --config configs/smollm2-w8a8.yaml
  ptq quantize --config configs/smollm2-w8a8.yaml --dry-run
  ptq quantize --config configs/smollm2-w4a16-g64.yaml \\
      --set model=HuggingFaceTB/SmolLM2-360M-Instruct --set output=out/smollm2-360m

python scripts/quantize_model.py is the same. `ptq init` writes a config.

schemes (or any wBaB[-gN|-tensor][-asym][-static], or the full form in YAML):
  {", ".join(PRESETS)}"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    made = command_parser(__doc__, EPILOG, prog)
    add_config(made)
    made.add_argument("--overwrite", action="store_true", help="replace an existing ptq checkpoint")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and what the run will need, and stop; loads no weights",
    )
    made.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="end with exit code 3 where the figures violate it, as in 'kl_mean > 0.05', beside "
        "evaluation.fail_if of the recipe; the checkpoint is kept; repeatable",
    )
    made.add_argument("--full-plan", action="store_true", help="one row for each layer")
    mode = made.add_mutually_exclusive_group()
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
    return made


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    options.mode = options.mode or "normal"
    return carry_out(options, options.dry_run, options.overwrite, options.mode, options.fail_if)


def carry_out(
    options: argparse.Namespace,
    dry_run: bool,
    overwrite: bool = False,
    mode: Literal["normal", "quiet", "json"] = "normal",
    fail_if: Sequence[str] = (),
) -> int:
    """Do what the config says, or show its plan; the exit code."""
    from ptq.config import load_config, with_conditions
    from ptq.pipeline import run
    from ptq.report import Console

    console = Console(mode)

    def action() -> None:
        changes = overrides(options)
        if overwrite:
            changes.append("output.overwrite=true")
        config = with_conditions(load_config(options.config, changes), fail_if)
        report = run(config, dry_run=dry_run, full_plan=options.full_plan, console=console)
        if console.mode == "json":
            print(report.to_json())
        report.check_gate()

    return run_command(action, console)
