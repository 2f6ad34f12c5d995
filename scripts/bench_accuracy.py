#!/usr/bin/env python
"""Compare schemes on one model and one text: perplexity ratio, divergence, agreement, size.

The float model runs once and its logits wait on disk (TMPDIR; about 100 MB a window of 512 tokens
for a vocabulary of 49,152); then each scheme quantizes a fresh copy. Prints a Markdown table.
"""

import argparse
import copy
import json
import sys
import time
from typing import Any

from arguments import model_parser

from ptq.command import output_file, positive, run_command
from ptq.report import Console, environment

SCHEMES = ("w8a16", "w8a8", "w4a16-g64", "w4a16-g64-asym", "w4a8-g64")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["calibration_data/evaluation.jsonl"])
    parser.add_argument("--calibration", help="text for schemes with static activations")
    parser.add_argument(
        "--samples", type=positive, default=64, help="calibration samples (default: 64)"
    )
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--windows", type=positive, default=16)
    parser.add_argument("--context", type=positive, default=512)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the float model"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def bench(options: argparse.Namespace, console: Console) -> None:
    import ptq
    from ptq.calibrate import evaluation_windows
    from ptq.config import EvaluationConfig
    from ptq.evaluation import ReferenceLogits, compare

    console.stage("load")
    model, tokenizer = ptq.load_float(options.model, dtype=options.dtype)
    section = EvaluationConfig(data=options.data, windows=options.windows, context=options.context)
    tokens = evaluation_windows(section, tokenizer)
    rows: list[dict[str, Any]] = []
    with ReferenceLogits() as reference:
        console.stage("float model")
        reference.record(model, tokens.sequences, console.bar("window"))
        for scheme in options.schemes:
            console.stage(scheme)
            config: dict[str, Any] = {"scheme": scheme}
            if options.calibration:
                config["calibration"] = {
                    "data": options.calibration,
                    "samples": options.samples,
                    "sequence_length": options.context,
                }
            candidate = copy.deepcopy(model)
            start = time.perf_counter()
            result = ptq.quantize(candidate, config, tokenizer=tokenizer, console=console)
            seconds = time.perf_counter() - start
            found = compare(candidate, tokens, reference, progress=console.bar("window"))
            size = ptq.plan(model, scheme).bytes_after
            rows.append({"scheme": str(result.config.scheme), "seconds": seconds,
                         "tensor_bytes": size, **found.to_dict()})  # fmt: skip
            console.say(found)
    console.say("\n" + table(rows))
    if options.json:
        document = {"model": options.model, "environment": environment(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| scheme | perplexity ratio [95%] | KL mean | top-1 agreement |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['scheme']} | {r['ratio']:.4f} [{r['ratio_low']:.4f}, {r['ratio_high']:.4f}] "
        f"| {r['kl_mean']:.4f} | {100 * r['top1_agreement']:.1f}% |"
        for r in rows
    ]
    protocol = rows[0]["protocol"]
    return "\n".join(lines) + (
        f"\n\nFloat perplexity {rows[0]['float_perplexity']:.3f} ({protocol['float_dtype']}), "
        f"{protocol['tokens_scored']:,} tokens in {protocol['windows']} windows of "
        f"{protocol['context']}, tokens {protocol['tokens_sha256'][:12]}."
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: bench(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
