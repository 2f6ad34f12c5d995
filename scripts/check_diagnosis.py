#!/usr/bin/env python
"""Damage one layer of a model by hand, in every way of planted.py, and see whether it is named.

For each damage a layer is drawn; it is damaged and diagnosed, and must come before all the model's
other layers (as one with a fault, or by its divergence), with the right cause. What a layer does
alone does not depend on the others, so those are measured once a scheme.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from arguments import command_line, model_parser
from planted import PLANTED, Planted, inject_outlier
from torch import nn

import ptq
from ptq.calibrate import TokenSet, batches, collect, evaluation_windows
from ptq.command import output_file, positive, run_command
from ptq.config import EvaluationConfig, Plugin
from ptq.report import Console
from ptq.sensitivity import exact_divergence

LARGER = {"w4a16-g16": "w4a16-g64-asym", "w4a16-g16-asym": "w4a16-g64-asym", "w8a16": "w8a8"}
"""Schemes of the tiny models, and those that are planted in here: each takes a run a layer."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="text")
    parser.add_argument("--windows", type=positive, default=1, help="default: 1")
    parser.add_argument("--context", type=positive, default=64, help="tokens (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the layers (default: 0)")
    parser.add_argument(
        "--others",
        type=Path,
        metavar="FILE",
        help="what --json wrote for the same text, so that the sound layers need not run again",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def others(model: nn.Module, scheme: str, tokens: TokenSet, console: Console) -> dict[str, float]:
    """The divergence of every layer, sound."""
    console.stage(f"all layers, {scheme}")
    plan = ptq.plan(model, scheme)
    seen = collect(model, plan.static_layers, batches(tokens, 1), Plugin(name="minmax"))
    found = exact_divergence(
        model, tokens, plan.schemes, parts=("both",), statistics=seen, progress=console.bar("layer")
    )
    return {f.layer: f.kl for f in found}


def diagnosed(case: Planted, scheme: str, model: nn.Module, name: str, tokens: TokenSet) -> Any:
    """The diagnosis of the damaged layer."""
    if case.name == "outlier channel":
        model = copy.deepcopy(model)
        inject_outlier(model, name.rpartition(".mlp.")[0])
    made = copy.deepcopy(model)
    rules = [
        {"layers": "*", "scheme": "float"},
        {"layers": name, "scheme": case.own_scheme or scheme},
    ]
    data = list(batches(tokens, 1))
    ptq.quantize(
        made, {"scheme": scheme, "rules": rules}, calibration=data, console=Console("quiet")
    )
    if case.damage is not None:
        layer = made.get_submodule(name)
        assert isinstance(layer, ptq.QuantLinear)
        case.damage(layer)
    return ptq.diagnose(model, tokens, made, top=0).layers[0]


def check(options: argparse.Namespace, console: Console, command: str) -> None:
    start = time.perf_counter()
    model, tokenizer = ptq.load_float(options.model, dtype="float32")
    section = EvaluationConfig(data=options.data, windows=options.windows, context=options.context)
    tokens = evaluation_windows(section, tokenizer)
    generator = torch.Generator().manual_seed(options.seed)
    known: dict[str, dict[str, float]] = {}
    if options.others is not None:
        known = json.loads(options.others.read_text(encoding="utf-8"))["others"]
    rows = []
    for case in PLANTED:
        scheme = LARGER.get(str(case.scheme), str(case.scheme))
        if scheme not in known:
            known[scheme] = others(model, scheme, tokens, console)
        names = [name for name in known[scheme] if name.endswith(case.layer)]
        name = names[int(torch.randint(len(names), (1,), generator=generator))]
        found = diagnosed(case, scheme, model, name, tokens)
        worse = sum(kl > found.kl for other, kl in known[scheme].items() if other != name)
        first = found.cause in case.causes and (found.fault or worse == 0)
        rows.append({"damage": case.name, "first": first, "worse": worse, **asdict(found)})
        console.say(
            f"{'named' if first else 'MISSED'}: {case.name} in {name} ({scheme}): {found.cause}, "
            f"{found.detail}; KL {found.kl:.3g}, {worse} of {len(known[scheme]) - 1} other layers "
            "have more"
        )
    console.say(f"{sum(row['first'] for row in rows)} of {len(rows)} named first")
    if options.json:
        seconds = time.perf_counter() - start
        figures = {"command": command, "seconds": seconds, "damages": rows, "others": known}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    command = command_line(__file__, arguments)
    return run_command(lambda: check(options, console, command), console)


if __name__ == "__main__":
    sys.exit(main())
