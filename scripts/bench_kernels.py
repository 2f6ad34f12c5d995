#!/usr/bin/env python
"""Time quantized linear layers against float ones: whole forward, cold weights, alternating.

Each layer exists in enough copies to exceed the last-level cache, and every call takes the next
copy, because a layer of a real model finds its weights in memory, not in cache. The candidates
take turns within one process, so a machine that slows down slows all of them. A ratio above 1
means faster than float; the spread is the 10th to 90th percentile of the ratios of the turns.
"""

import argparse
import json
import sys
from functools import partial
from itertools import cycle
from typing import Any

import torch
from arguments import command_line, dynamic_scheme, shape
from racing import compared, race, speeds, timed
from torch import Tensor, nn

from ptq.algorithms import round_to_nearest
from ptq.command import output_file, positive, run_command
from ptq.config import Scheme, preset
from ptq.modules import QuantLinear
from ptq.report import Console, environment

SHAPES = ("576x576", "1536x576", "576x1536", "2048x2048", "8192x2048", "4096x4096")
SCHEMES = ("w8a8", "w8a16", "w4a16-g64", "w4a16-g64-asym", "w4a8-g64")
ROWS = (1, 4, 8, 16, 32, 128, 512)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--schemes", nargs="+", type=dynamic_scheme, default=SCHEMES)
    parser.add_argument("--rows", nargs="+", type=positive, default=ROWS, metavar="M")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the activations")  # fmt: skip
    parser.add_argument(
        "--cache-mb", type=positive, default=64, help="bytes that copies must exceed"
    )
    parser.add_argument("--seconds", type=float, default=0.6, help="time for one cell")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    options.command = command_line(__file__, arguments)
    return options


def float_layers(n: int, k: int, dtype: torch.dtype, copies: int) -> list[nn.Module]:
    weight = torch.randn(n, k) / k**0.5
    layers = []
    for _ in range(copies):
        layer = nn.Linear(k, n, bias=False, dtype=dtype)
        layer.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
        layers.append(layer)
    return layers


def quantized_layers(n: int, k: int, scheme: Scheme, copies: int) -> list[nn.Module]:
    weight = torch.randn(n, k) / k**0.5
    return [QuantLinear(round_to_nearest(weight, scheme.weights), scheme) for _ in range(copies)]


def once(layers: "cycle[nn.Module]", x: Tensor) -> float:
    layer = next(layers)
    return timed(lambda: layer(x))


def measure(n: int, k: int, m: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    copies = max(2, options.cache_mb * 1_000_000 // (n * k) + 1)
    dtype = getattr(torch, options.dtype)
    pools: dict[str, tuple[list[nn.Module], Tensor]] = {}
    x = torch.randn(m, k)
    for name in ("bfloat16", "float32"):
        float_dtype = getattr(torch, name)
        pools[name] = float_layers(n, k, float_dtype, copies), x.to(float_dtype)
    for name in options.schemes:
        pools[name] = quantized_layers(n, k, preset(name), copies), x.to(dtype)
    for layers, value in pools.values():
        for layer in layers:
            layer(value)
    candidates = {
        name: partial(once, cycle(layers), value) for name, (layers, value) in pools.items()
    }
    times = race(candidates, options.seconds)
    rows = []
    for name in options.schemes:
        layer = pools[name][0][0]
        assert isinstance(layer, QuantLinear)
        kernel = layer.kernel(x.to(dtype)).name
        shape = {"n": n, "k": k, "m": m, "scheme": name, "kernel": kernel}
        rows.append({**shape, **compared(times, name, ("bfloat16", "float32"))})
    return rows


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['n']}x{row['k']:<6} M={row['m']:<5} {row['scheme']:15} {row['kernel']:12} "
        f"{speeds(row)}"
    )


@torch.no_grad()
def bench(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for text in options.shapes:
        n, k = map(int, text.split("x"))
        for m in options.rows:
            for row in measure(n, k, m, options):
                rows.append(row)
                print(show(row), flush=True)
    if options.json:
        document = {"command": options.command, "environment": environment(), "rows": rows}
        options.json.write_text(json.dumps(document, indent=1))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: bench(options), Console())


if __name__ == "__main__":
    sys.exit(main())
