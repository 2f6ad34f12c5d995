#!/usr/bin/env python
"""Time every kernel of quantized linear layers against float ones: whole forward, cold weights.

Each layer exists in enough copies to exceed the last-level cache, and every call takes the next
copy, because a layer of a real model finds its weights in memory, not in cache. The candidates
take turns within one process, so a machine that slows down slows all of them. A ratio above 1
means faster than float; the spread is the 10th to 90th percentile of the ratios of the turns. A
star marks the kernel that the rule of thumb chooses; the others need ptq.tune, and memory where
they keep a second form of the weight.
"""

import argparse
import sys
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch
from arguments import command_line, dynamic_scheme, shape
from figures import write_figures
from racing import compared, race, speeds, timed
from torch import Tensor, nn

from ptq.algorithms import round_to_nearest
from ptq.command import output_file, positive, run_command
from ptq.config import Scheme, preset
from ptq.kernels import KERNELS, Kernel, select
from ptq.modules import QuantLinear
from ptq.report import Console, environment

SHAPES = ("576x576", "1536x576", "576x1536", "2048x2048", "8192x2048", "4096x4096")
SCHEMES = ("w8a8", "w8a16", "w4a16-g64", "w4a16-g64-asym", "w4a8-g64")
ROWS = (1, 4, 8, 16, 32, 64, 128, 512)
BASES = ("bfloat16", "float32")


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
    parser.add_argument("--seconds", type=float, default=2, help="for one shape and number of rows")
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


def quantized_layers(n: int, k: int, scheme: Scheme, copies: int) -> list[QuantLinear]:
    weight = torch.randn(n, k) / k**0.5
    return [QuantLinear(round_to_nearest(weight, scheme.weights), scheme) for _ in range(copies)]


def once(layers: "cycle[nn.Module]", x: Tensor) -> float:
    layer = next(layers)
    return timed(lambda: layer(x))


def forced(layers: "cycle[nn.Module]", kernel: Kernel, x: Tensor) -> float:
    layer = next(layers)
    assert isinstance(layer, QuantLinear)
    return timed(lambda: layer.run(x, kernel))


class Bench:
    """The layers of one shape: float ones in both dtypes, and quantized ones of each scheme."""

    def __init__(self, n: int, k: int, options: argparse.Namespace):
        self.n, self.k = n, k
        self.seconds, self.dtype = options.seconds, getattr(torch, options.dtype)
        copies = max(2, options.cache_mb * 1_000_000 // (n * k) + 1)
        self.floats = {
            base: cycle(float_layers(n, k, getattr(torch, base), copies)) for base in BASES
        }
        self.layers = {
            scheme: quantized_layers(n, k, preset(scheme), copies) for scheme in options.schemes
        }

    def kernels(self, scheme: str, m: int) -> list[Kernel]:
        """All that serve m rows, each with its form of the weight made for every layer."""
        layers = self.layers[scheme]
        spec = layers[0].spec("cpu", self.dtype, m)
        found = [k for k in KERNELS if k.supports(spec) is None and k.name != "reference"]
        for kernel in found:
            for layer in layers:
                layer.prepared(kernel, self.dtype)
        return found

    def measure(self, m: int) -> list[dict[str, Any]]:
        """A row for each scheme and kernel; all take turns."""
        x = torch.randn(m, self.k)
        candidates = {
            base: partial(once, layers, x.to(getattr(torch, base)))
            for base, layers in self.floats.items()
        }
        served = {scheme: self.kernels(scheme, m) for scheme in self.layers}
        for scheme, kernels in served.items():
            for kernel in kernels:
                run = partial(forced, cycle(self.layers[scheme]), kernel, x.to(self.dtype))
                candidates[f"{scheme} {kernel.name}"] = run
        for run in candidates.values():
            run()
        times = race(candidates, self.seconds)
        return [
            {
                **self.describe(scheme, kernel, m),
                **compared(times, f"{scheme} {kernel.name}", BASES),
            }
            for scheme, kernels in served.items()
            for kernel in kernels
        ]

    def describe(self, scheme: str, kernel: Kernel, m: int) -> dict[str, Any]:
        """Sizes; whether the rule of thumb chooses the kernel; the memory of codes and form, as a
        share of the layer in bfloat16."""
        layer = self.layers[scheme][0]
        spec = layer.spec("cpu", self.dtype, m)
        held = layer.quantized_weight.nbytes + kernel.extra_bytes(spec)
        return {
            "n": self.n,
            "k": self.k,
            "m": m,
            "scheme": scheme,
            "kernel": kernel.name,
            "chosen": kernel == select(spec),
            "memory": held / (2 * self.n * self.k),
        }


def show(row: dict[str, Any]) -> str:
    mark = "*" if row["chosen"] else " "
    return (
        f"{row['n']}x{row['k']:<6} M={row['m']:<5} {row['scheme']:15} {mark}{row['kernel']:17} "
        f"{row['memory']:4.2f} of bfloat16's memory {speeds(row)}"
    )


def bandwidth() -> float:
    """GB/s that all threads read from memory together."""
    values = torch.ones(96_000_000)  # written: an untouched page would be the zero page
    return values.nbytes / 1e9 / median(timed(values.sum) for _ in range(7))


@torch.no_grad()
def bench(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    speed = bandwidth()
    print(f"memory is read at {speed:.1f} GB/s")
    for text in options.shapes:
        n, k = map(int, text.split("x"))
        shape_bench = Bench(n, k, options)
        for m in options.rows:
            for row in shape_bench.measure(m):
                rows.append(row)
                print(show(row), flush=True)
    if options.json:
        document = {
            "command": options.command, "environment": environment(), "bandwidth": speed,
            "rows": rows,
        }  # fmt: skip
        write_figures(options.json, document)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: bench(options), Console())


if __name__ == "__main__":
    sys.exit(main())
