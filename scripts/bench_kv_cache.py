#!/usr/bin/env python
"""Measure quantized key-value caches: perplexity through them, their bytes, and decoding speed.

Perplexity is that of the float model with the quantized cache against the float model without
one, on the same windows. Bytes are those of a bfloat16 model. Speed is of bfloat16 decoding,
--tokens one after the other behind a prompt, quantizing included; the caches take turns in one
process, so a machine that slows down slows all of them. The spread is the 10th to 90th percentile
of the turns' ratios.
"""

import argparse
import copy
import sys
from functools import partial
from typing import Any

import torch
import yaml
from arguments import model_parser
from figures import protocol_line, ratio_cell, write_figures
from racing import compared, race, timed
from torch import Tensor

from ptq.command import output_file, positive, run_command
from ptq.config import cache_config
from ptq.report import Console, environment

FLOAT = "bfloat16"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["calibration_data/evaluation.jsonl"])
    parser.add_argument(
        "--caches",
        nargs="+",
        type=yaml.safe_load,
        default=["int8", "int4"],
        metavar="YAML",
        help="as in a configuration: int8, '{bits: 4, window: 128}', '{bits: 8, mode: static}' "
        "(default: int8 int4)",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=["calibration_data/calibration.jsonl"],
        help="text for static caches",
    )
    parser.add_argument("--samples", type=positive, default=64, help="sequences of that text")
    parser.add_argument(
        "--sequence-length", type=positive, default=512, metavar="T", help="of each"
    )
    parser.add_argument("--observer", default="minmax", help="for static caches")
    parser.add_argument("--windows", type=int, default=8, help="0: no perplexity")
    parser.add_argument("--context", type=positive, default=2048, metavar="T")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="for perplexity"
    )
    parser.add_argument(
        "--decode-after", nargs="*", type=positive, default=(256, 2048), metavar="T"
    )
    parser.add_argument("--tokens", type=positive, default=64, help="decoded in a turn")
    parser.add_argument("--seconds", type=float, default=60, help="for each length of prompt")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def perplexities(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each cache."""
    import ptq
    from ptq.calibrate import evaluation_windows
    from ptq.config import EvaluationConfig
    from ptq.evaluation import ReferenceLogits, compare

    model, tokenizer = ptq.load_float(options.model, dtype=options.dtype)
    section = EvaluationConfig(data=options.data, windows=options.windows, context=options.context)
    tokens = evaluation_windows(section, tokenizer)
    rows = []
    with ReferenceLogits() as reference:
        console.stage("float model")
        reference.record(model, tokens.sequences, console.bar("window"))
        for cache in options.caches:
            console.stage(str(cache))
            quantize(model, cache, tokenizer, options, console)
            bar = console.bar("window")
            found = compare(model, tokens, reference, through_cache=True, progress=bar)
            settings = cache_config(cache)
            rows.append(
                {
                    "name": str(cache),
                    "settings": settings.model_dump(mode="json"),
                    "kind": str(settings),
                    **found.to_dict(),
                    "cache": bfloat16_size(model, cache, options.context),
                }
            )
            console.say(found)
    return rows


def quantize(
    model: Any, cache: Any, tokenizer: Any, options: argparse.Namespace, console: Console
) -> None:
    """Quantize the model's cache, on calibration text where it is static."""
    import ptq
    from ptq.calibrate import batches, calibration_tokens
    from ptq.config import CalibrationConfig

    data = None
    if cache_config(cache).static:
        section = CalibrationConfig(
            data=options.calibration,
            samples=options.samples,
            sequence_length=options.sequence_length,
        )
        data = list(batches(calibration_tokens(section, tokenizer), 1))
    bar = console.bar("sequence")
    ptq.quantize_cache(model, cache, calibration=data, observer=options.observer, progress=bar)


@torch.no_grad()
def bfloat16_size(model: Any, cache: Any, tokens: int) -> Any:
    """What the cache of a bfloat16 model holds, from a run without values on the meta device."""
    import ptq
    from ptq.kv_cache import held_scales
    from ptq.model import skeleton

    empty = skeleton(copy.deepcopy(model.config), torch.bfloat16)
    scales = copy.deepcopy(held_scales(model))
    made = ptq.QuantizedCache(
        model.config,
        scales=scales and {index: layer.to("meta") for index, layer in scales.items()},
        **cache_config(cache).model_dump(),
    )
    ids = torch.zeros((1, tokens), dtype=torch.int64, device="meta")
    empty(input_ids=ids, past_key_values=made, use_cache=True)
    return made.size().to_dict()


def decode(model: Any, ids: Tensor, filled: Any) -> float:
    """Seconds a token, behind a copy of a filled cache."""
    cache = copy.deepcopy(filled)

    def steps() -> None:
        for i in range(ids.shape[1]):
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)

    return timed(steps) / ids.shape[1]


@torch.no_grad()
def speeds(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each cache and length of prompt."""
    if not options.decode_after:
        return []
    import ptq
    from ptq.kv_cache import new_cache

    model, tokenizer = ptq.load_float(options.model, dtype="bfloat16")
    rows = []
    for length in options.decode_after:
        console.stage(f"decode after {length}")
        ids = torch.randint(5, model.config.vocab_size, (1, length + options.tokens))
        prompt, following = ids[:, :length], ids[:, length:]
        filled = {FLOAT: model(input_ids=prompt, use_cache=True).past_key_values}
        for cache in options.caches:
            quantize(model, cache, tokenizer, options, console)
            filled[str(cache)] = new_cache(model)
            model(input_ids=prompt, past_key_values=filled[str(cache)], use_cache=True)
        candidates = {
            name: partial(decode, model, following, cache) for name, cache in filled.items()
        }
        times = race(candidates, options.seconds)
        for name in filled:
            rows.append({"name": name, "after": length, **compared(times, name, (FLOAT,))})
            console.say(speed_line(rows[-1]))
    return rows


def speed_line(row: dict[str, Any]) -> str:
    low, high = row[f"spread_over_{FLOAT}"]
    return (
        f"{row['name']:32} after {row['after']:5}  {row['milliseconds']:7.1f} ms a token  "
        f"{row[f'speed_over_{FLOAT}']:.2f}x {FLOAT} [{low:.2f}, {high:.2f}]"
    )


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| cache | perplexity ratio [95%] | KL mean | top-1 agreement | bytes, of bfloat16's |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['kind']} | {ratio_cell(r)} "
        f"| {r['kl_mean']:.4f} | {100 * r['top1_agreement']:.1f}% "
        f"| {r['cache']['fraction']:.4f} at {r['cache']['tokens']:,} tokens |"
        for r in rows
    ]
    return "\n".join(lines) + "\n\n" + protocol_line(rows[0])


def bench(options: argparse.Namespace, console: Console) -> None:
    quality = perplexities(options, console) if options.windows else []
    speed = speeds(options, console)
    if quality:
        console.say("\n" + table(quality))
    if options.json:
        document = {
            "model": options.model, "environment": environment(),
            "quality": quality, "speed": speed,
        }  # fmt: skip
        write_figures(options.json, document)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: bench(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
