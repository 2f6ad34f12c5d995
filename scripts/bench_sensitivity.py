#!/usr/bin/env python
"""How well the cheap prediction of sensitivities ranks layers: against the exact divergence.

The exact one quantizes each layer alone, in place, on each of --exact-windows of the text; the
prediction takes one pass of gradients over --windows. Prints Spearman's correlation for each
scheme, and that of the exact windows with each other, which is what one window can say at all.
"""

import argparse
import json
import sys

from arguments import model_parser

from ptq.command import output_file, positive, run_command
from ptq.report import Console


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["calibration_data/calibration.jsonl"])
    parser.add_argument(
        "--schemes", nargs="+", default=["w4a16-g64-asym", "w3a16-g64-asym", "w8a8"]
    )
    parser.add_argument("--windows", type=positive, default=8, help="predicted on (default: 8)")
    parser.add_argument("--exact-windows", type=positive, default=2, help="default: 2")
    parser.add_argument("--context", type=positive, default=512, help="tokens a window")
    parser.add_argument(
        "--every", type=positive, default=1, help="of so many blocks, one is measured (default: 1)"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def bench(options: argparse.Namespace, console: Console) -> None:
    from dataclasses import replace
    from itertools import combinations
    from statistics import mean

    from scipy.stats import spearmanr

    import ptq
    from ptq.calibrate import calibration_tokens
    from ptq.config import CalibrationConfig, preset
    from ptq.model import block_lists
    from ptq.sensitivity import exact_divergence
    from ptq.sensitivity.fisher import clipped, predicted_divergence

    console.stage("load")
    model, tokenizer = ptq.load_float(options.model, dtype="float32")
    section = CalibrationConfig(
        data=options.data, samples=options.windows, sequence_length=options.context
    )
    seen = calibration_tokens(section, tokenizer)
    schemes = [preset(name) for name in options.schemes]
    kept = [f"{name}." for names in block_lists(model) for name in names[:: options.every]]
    layers = [name for name in ptq.plan(model, schemes[0]).schemes if name.startswith(tuple(kept))]
    candidates = {name: schemes for name in layers}
    console.stage("predict")
    predicted = predicted_divergence(model, seen, candidates, progress=console.bar("sequence"))
    console.stage("exact")
    windows = [
        exact_divergence(
            model, replace(seen, sequences=(sequence,)), candidates, parts=["both"],
            quantize=clipped, progress=console.bar("layer"),
        )
        for sequence in seen.sequences[: options.exact_windows]
    ]  # fmt: skip
    rows = [
        {"layer": one[0].layer, "scheme": str(one[0].scheme), "exact": mean(e.kl for e in one),
         "windows": [e.kl for e in one], "predicted": predicted.kl({one[0].layer: one[0].scheme})}
        for one in zip(*windows, strict=True)
    ]  # fmt: skip
    for name in map(str, schemes):
        mine = [row for row in rows if row["scheme"] == name]
        found = spearmanr(*([row[key] for row in mine] for key in ("exact", "predicted"))).statistic
        each = list(zip(*(row["windows"] for row in mine), strict=True))
        among = [spearmanr(a, b).statistic for a, b in combinations(each, 2)]
        themselves = f"; those with each other {mean(among):.3f}" if among else ""
        console.say(
            f"{name}: Spearman {found:.3f} over {len(mine)} layers; predicted on "
            f"{len(seen.sequences)} windows, exact on {len(windows)}{themselves}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: bench(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
