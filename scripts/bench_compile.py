#!/usr/bin/env python
"""Time decoding with ptq.compile against the float model, eager and compiled the same way.

Every model generates in turn in one process, through ``model.generate``. A turn is the time of
``--tokens`` new tokens less the time of the first, so the prompt does not count. The spread is the
10th to 90th percentile of the turns' ratios. First tokens include the compilation: on a cold cache
(TORCHINDUCTOR_CACHE_DIR in an empty directory) some 15 s for 30 blocks.
"""

import argparse
import copy
import sys
import time
from functools import partial
from typing import Any

import torch
import yaml
from arguments import command_line, model_parser
from figures import write_figures
from model_candidates import RANDOM, random_in_memory
from racing import compared, race, timed
from torch import Tensor

from ptq.command import output_file, positive, run_command
from ptq.model import resolve_device
from ptq.report import Console, environment

SCHEMES = ("w8a8", "w4a16-g64")
BASES = ("bfloat16", "bfloat16 compiled")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--random", choices=RANDOM, help="random weights in place of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument(
        "--head", metavar="SCHEME", help="quantize the output head too, for instance with w8a8"
    )
    parser.add_argument(
        "--caches",
        nargs="+",
        type=yaml.safe_load,
        default=[],
        metavar="YAML",
        help="each scheme with these key-value caches too: int8, '{bits: 8, mode: static}'",
    )
    parser.add_argument("--prompt", type=positive, default=128, metavar="T")
    parser.add_argument("--tokens", type=positive, default=33, metavar="T")
    parser.add_argument("--seconds", type=float, default=40, help="for the whole table")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    options.command = command_line(__file__, arguments)
    return options


def build(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The bfloat16 model and a quantized copy for each scheme."""
    import ptq

    device = resolve_device(options.device)
    if options.random:
        model = random_in_memory(options.random, torch.bfloat16, device)
    else:
        model = ptq.load_float(options.model, dtype="bfloat16")[0].to(device)
    models = {"bfloat16": model}
    head = [{"layers": "lm_head", "scheme": options.head}] if options.head else []
    tied = {"tied_embeddings": "untie"} if options.head else {}
    for scheme in options.schemes:
        models[scheme] = copy.deepcopy(model)
        request = {"scheme": scheme, "rules": head, **tied}
        ptq.quantize(models[scheme], request, console=console)
        for cache in options.caches:
            # Which scales a static cache has does not change how fast it is.
            text = torch.randint(5, model.config.vocab_size, (1, 64))
            twin = copy.deepcopy(models[scheme])
            models[f"{scheme}, cache {cache}"] = ptq.quantize_cache(twin, cache, calibration=[text])
    return models


def generate(model: Any, ids: Tensor, tokens: int) -> None:
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def decode(model: Any, ids: Tensor, tokens: int) -> float:
    """Seconds a token."""
    first = timed(lambda: generate(model, ids, 1))
    return (timed(lambda: generate(model, ids, tokens)) - first) / (tokens - 1)


@torch.no_grad()
def bench(options: argparse.Namespace, console: Console) -> None:
    import ptq

    models = build(options, console)
    model = models["bfloat16"]
    ids = torch.randint(5, model.config.vocab_size, (1, options.prompt)).to(model.device)
    first_tokens = {}
    for name in list(models):
        compiled = copy.deepcopy(models[name])
        start = time.perf_counter()
        ptq.compile(compiled, max_length=options.prompt + options.tokens)
        first_tokens[name] = time.perf_counter() - start
        console.say(f"{name:24} compiled in {first_tokens[name]:.0f} s")
        models[f"{name} compiled"] = compiled
    candidates = {
        name: partial(decode, model, ids, options.tokens) for name, model in models.items()
    }
    race(candidates, 0, turns=1)
    times = race(candidates, options.seconds)
    rows = []
    for name in models:
        row = {"model": name, **compared(times, name, BASES)}
        if name in first_tokens:
            row["compile_seconds"] = first_tokens[name]
        rows.append(row)
        console.say(
            f"{name:48} {1e3 / row['milliseconds']:6.1f} tokens/s  "
            f"{row['speed_over_bfloat16']:5.2f}x bfloat16 eager "
            f"[{row['spread_over_bfloat16'][0]:.2f}, {row['spread_over_bfloat16'][1]:.2f}]  "
            f"{row['speed_over_bfloat16 compiled']:5.2f}x bfloat16 compiled"
        )
    if options.json:
        document = {
            "model": f"random weights, {options.random}" if options.random else options.model,
            "device": options.device, "head": options.head,
            "command": options.command, "environment": environment(), "rows": rows,
        }  # fmt: skip
        write_figures(options.json, document)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: bench(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
