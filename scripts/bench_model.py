#!/usr/bin/env python
"""Time whole quantized models against the float model: prefill of a prompt, and decoding.

Every model takes its turn in one process, so a machine that slows down slows all of them. Prefill
is one forward pass over a prompt; decode is one step with a key-value cache behind a prompt. A
ratio above 1 means faster than float; the spread is the 10th to 90th percentile of the turns.
"""

import argparse
import copy
import json
import sys
from functools import partial
from typing import Any

import torch
from arguments import model_parser
from racing import compared, race, speeds, timed
from torch import Tensor

from ptq.command import output_file, positive, run_command
from ptq.report import Console, environment

SCHEMES = ("w8a8", "w8a16", "w4a16-g64", "w4a16-g64-asym", "w4a8-g64")
BASES = ("bfloat16", "float32")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of what stays float in the quantized models")  # fmt: skip
    parser.add_argument(
        "--prefill", nargs="+", type=positive, default=(16, 64, 128, 512), metavar="T"
    )
    parser.add_argument("--decode-after", type=positive, default=128, metavar="T",
                        help="tokens before the decoded one (default: 128)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=20, help="for each row of the table")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The float model in both dtypes, and a quantized copy for each scheme."""
    import ptq
    from ptq.model import cast_parameters

    model, _ = ptq.load_float(options.model, dtype="float32")
    models: dict[str, Any] = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16()}
    for scheme in options.schemes:
        candidate = copy.deepcopy(model)
        ptq.quantize(candidate, scheme, console=console)
        cast_parameters(candidate, getattr(torch, options.dtype))
        models[scheme] = candidate
    return models


def prefill(model: Any, ids: Tensor) -> float:
    return timed(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))


def decode(model: Any, ids: Tensor, cache: Any) -> float:
    """One step; the cache is cut back afterwards, so that every step is the same."""
    length = cache.get_seq_length()
    seconds = timed(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True))
    cache.crop(length - cache.get_seq_length())
    return seconds


@torch.no_grad()
def bench(options: argparse.Namespace, console: Console) -> None:
    models = build(options, console)
    vocabulary = models["float32"].config.vocab_size
    ids = torch.randint(0, vocabulary, (1, max(*options.prefill, options.decode_after)))
    tasks = {
        f"prefill {length}": {
            name: partial(prefill, model, ids[:, :length]) for name, model in models.items()
        }
        for length in options.prefill
    }
    tasks["decode"] = {
        name: partial(
            decode,
            model,
            ids[:, :1],
            model(input_ids=ids[:, : options.decode_after], use_cache=True).past_key_values,
        )
        for name, model in models.items()
    }
    found: list[dict[str, Any]] = []
    for task, candidates in tasks.items():
        race(candidates, 0)  # does not count: kernels are prepared, caches filled
        times = race(candidates, options.seconds)
        for scheme in options.schemes:
            row = {"task": task, "scheme": scheme, **compared(times, scheme, BASES)}
            found.append(row)
            console.say(f"{task:12} {scheme:15} {speeds(row)}")
    if options.json:
        document = {"model": options.model, "environment": environment(), "rows": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: bench(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
