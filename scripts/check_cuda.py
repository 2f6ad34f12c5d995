#!/usr/bin/env python
"""Check every kernel on a machine with a GPU, and print a table for the README.

Each kernel that supports a layer is compared with the reference kernel (dequantize, multiply in
float32) and timed against the float layer; ``*`` marks the kernel that the rule of thumb chooses.
Weights are hot. An op that refuses a call that its contract allows is wrong, and says why. A kernel
of this device that no layer reached is named, with its reason. With ``--device cpu`` the same for
this machine's processor.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arguments import dynamic_scheme, script_parser, shape
from figures import write_figures
from racing import race, timed
from torch import Tensor, nn

from ptq.algorithms import round_to_nearest
from ptq.command import output_file, positive, run_command
from ptq.config import preset
from ptq.errors import ConfigError, UnsupportedError
from ptq.kernels import KERNELS, Kernel, LinearSpec, Reference
from ptq.model import resolve_device
from ptq.modules import QuantLinear
from ptq.report import Console, environment

SCHEMES = ("w8a16", "w8a8", "w8a8-asym", "w4a16-g64", "w4a16-g64-asym", "w4a8-g64", "fp8")
_LARGEST_STEP = {"int8": 1 / 127, "float8_e4m3fn": 1 / 14}  # between two codes, over the largest
_CAPTURED = 20  # calls in a graph: its launch is a small part
SHAPES = ("576x576", "2048x2048", "4096x4096")
ROWS = (1, 16, 17, 64, 512)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--schemes", nargs="+", type=dynamic_scheme, default=SCHEMES)
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=positive, default=ROWS, metavar="M")
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="time calls in CUDA graphs: without what Python and launching take",
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="for one kernel")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def within_tolerance(kernel: Kernel, layer: QuantLinear, x: Tensor, spec: LinearSpec) -> bool:
    """Whether every output is as near to the reference kernel's as the kernel says."""
    exact = layer.run(x.float(), Reference())
    weight = layer.quantized_weight.dequantize()
    magnitude = x.float().abs() @ weight.abs().t()
    eps = torch.finfo(spec.dtype).eps + spec.k * torch.finfo(torch.float32).eps
    allowed = (kernel.tolerance(spec) + eps) * magnitude
    if spec.activations is not None:  # a code may fall on the other side of a tie
        step = x.float().abs().amax(-1, keepdim=True) * _LARGEST_STEP[spec.activations.format]
        allowed = allowed + step * weight.abs().amax(1)
    return bool(((layer.run(x, kernel).float() - exact).abs() <= allowed).all())


def unreached(found: list[dict[str, Any]], specs: list[LinearSpec]) -> dict[str, str]:
    """The kernels of a device that served no layer, each with its reasons."""
    reached = {row["kernel"] for row in found}
    reasons = {}
    for kernel in KERNELS:
        said = {str(kernel.supports(spec)) for spec in specs}
        other = any(reason.startswith("for C") for reason in said)  # of another kind of device
        if kernel.name not in reached and not isinstance(kernel, Reference) and not other:
            reasons[kernel.name] = "; ".join(sorted(said))
    return reasons


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """What runs the call some times as one CUDA graph, as compiled decoding does."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CAPTURED):
            call()
    return graph.replay


def check(layer: QuantLinear, m: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All kernels on one layer and number of rows."""
    device = layer.codes.device
    dtype = getattr(torch, options.dtype)
    x = torch.randn(m, layer.in_features, device=device).to(dtype)
    weight = layer.quantized_weight.dequantize(dtype)
    spec = layer.spec(device.type, dtype, m)
    rows = []
    for kernel in KERNELS:
        if isinstance(kernel, Reference) or kernel.supports(spec) is not None:
            continue
        row = {
            "scheme": str(layer.scheme), "n": spec.n, "k": spec.k, "m": m,
            "kernel": kernel.name, "chosen": kernel == layer.kernel(x),
        }  # fmt: skip
        rows.append(row)
        try:
            row["right"] = within_tolerance(kernel, layer, x, spec)
        except RuntimeError as error:  # the op refuses what its contract allows
            row |= {"right": False, "error": str(error), "speed_over_float": None}
            continue
        calls = {
            "float": lambda: nn.functional.linear(x, weight),
            "kernel": lambda kernel=kernel: layer.run(x, kernel),
        }
        if options.graphs:
            calls = {name: captured(call) for name, call in calls.items()}
        times = race({name: partial(timed, call) for name, call in calls.items()}, options.seconds)
        speed = sorted(f / k for f, k in zip(times["float"], times["kernel"], strict=True))
        row["speed_over_float"] = speed[len(speed) // 2]
    return rows


@torch.no_grad()
def bench(options: argparse.Namespace) -> None:
    device = resolve_device(options.device)
    if options.graphs and device.type != "cuda":
        raise ConfigError(f"--graphs: CUDA graphs are for a GPU, not {device}")
    found: list[dict[str, Any]] = []
    specs: list[LinearSpec] = []
    print(f"{'layer':10} {'scheme':16} {'M':>5}  {'kernel':14} right  over {options.dtype}")
    for text in options.shapes:
        n, k = map(int, text.split("x"))
        for name in options.schemes:
            scheme = preset(name)
            weight = round_to_nearest(torch.randn(n, k) / k**0.5, scheme.weights)
            layer = QuantLinear(weight, scheme).to(device)
            for m in options.rows:
                specs.append(layer.spec(device.type, getattr(torch, options.dtype), m))
                for row in check(layer, m, options):
                    found.append(row)
                    mark = "*" if row["chosen"] else " "
                    speed = row["speed_over_float"]
                    print(f"{text:10} {name:16} {m:5} {mark}{row['kernel']:14} "
                          f"{'yes' if row['right'] else 'NO':5} "
                          f"{'-' if speed is None else f'{speed:.2f}x':>7} "
                          f"{row.get('error', '')[:300]}".rstrip(), flush=True)  # fmt: skip
    missing = unreached(found, specs)
    for name, reason in missing.items():
        print(f"not checked: {name}: {reason}")
    if options.json:
        document = {"environment": environment(), "rows": found, "not_checked": missing}
        write_figures(options.json, document)
    wrong = [row for row in found if not row["right"]]
    if wrong:
        raise UnsupportedError(
            f"{len(wrong)} of {len(found)} results are beyond the kernel's tolerance, the first of "
            f"{wrong[0]['kernel']}: please report the table"
        )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: bench(options), Console())


if __name__ == "__main__":
    sys.exit(main())
