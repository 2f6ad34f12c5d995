#!/usr/bin/env python
"""Write docs/accuracy.md from the JSON of bench_accuracy.py."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from arguments import script_parser

from ptq.command import run_command
from ptq.config import Scheme
from ptq.errors import ConfigError
from ptq.report import Console

COMMAND = """python scripts/bench_accuracy.py --data eval.txt --calibration calib.txt \\
  --windows WINDOWS --schemes SCHEME ... --recipes RECIPE ... --configs FILE ... \\
  --json docs/accuracy.json
python scripts/make_accuracy_page.py docs/accuracy.json"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("rows", type=Path, help="JSON of bench_accuracy.py")
    parser.add_argument("--output", type=Path, default=Path("docs/accuracy.md"))
    return parser.parse_args(arguments)


def read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; make it with bench_accuracy.py --json") from None
    if not isinstance(found, dict) or not found.get("rows"):
        raise ConfigError(f"{path} has no rows; make it with bench_accuracy.py --json")
    return found


def steps(row: dict[str, Any]) -> str:
    """The recipe with the options that were given."""
    given = row["config"]["recipe"]
    parts = []
    for step in given if isinstance(given, list) else [given]:
        if isinstance(step, str):
            parts.append(step)
            continue
        options = ", ".join(f"{key} {value}" for key, value in step.get("options", {}).items())
        parts.append(step["name"] + (f" ({options})" if options else ""))
    rules = [
        f"; `{rule['layers']}` {_word(rule['scheme'])}" for rule in row["config"].get("rules", [])
    ]
    return " + ".join(parts) + "".join(rules)


def _word(scheme: Any) -> str:
    return "float" if scheme is None else str(Scheme.model_validate(scheme))


def samples(row: dict[str, Any]) -> str:
    """Calibration samples; a peer's row has them beside its recipe."""
    config = row["config"]
    return str((config.get("calibration") or config).get("samples", "-"))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | samples | perplexity ratio [95%] | mean KL | top-1 agreement | threads "
        "| seconds | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: -r["ratio"]):
        ratio = f"{row['ratio']:.4f} [{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"
        lines.append(
            f"| {steps(row)} | {samples(row)} | {ratio} | {row['kl_mean']:.4f} "
            f"| {100 * row['top1_agreement']:.1f}% | {row['environment']['threads']} "
            f"| {row['seconds']:.0f} | {row['tensor_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def page(document: dict[str, Any]) -> str:
    rows = document["rows"]
    protocols = {row["protocol"]["tokens_sha256"]: row for row in rows}
    parts = [
        "# Accuracy",
        "Made by `scripts/make_accuracy_page.py` from `accuracy.json`, which this makes:",
        f"```bash\n{COMMAND}\n```",
        f"Model: `{document['model']}`. A ratio is the quantized model's perplexity divided by the "
        "float model's on the same tokens; the interval is of the paired difference. The output "
        "head is float. Seconds are of the whole quantization, calibration included; other work "
        "ran beside most of them.",
    ]
    for sha, first in protocols.items():
        protocol, machine = first["protocol"], first["environment"]
        parts.append(
            f"## {protocol['windows']} windows of {protocol['context']} tokens\n\n"
            f"{protocol['tokens_scored']:,} tokens scored (sha256 {sha[:12]}); float perplexity "
            f"{first['float_perplexity']:.3f} ({protocol['float_dtype']}). "
            f"{machine['processor']}, torch {machine['packages']['torch']}."
        )
        here = [row for row in rows if row["protocol"]["tokens_sha256"] == sha]
        for scheme in dict.fromkeys(row["scheme"] for row in here):
            found = table([row for row in here if row["scheme"] == scheme])
            parts.append(f"### {scheme}\n\n{found}")
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(
        lambda: options.output.write_text(page(read(options.rows)), encoding="utf-8"), Console()
    )


if __name__ == "__main__":
    sys.exit(main())
