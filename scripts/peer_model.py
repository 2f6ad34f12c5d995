#!/usr/bin/env python
"""Quantize a model with another toolkit, in its own environment, and take timed turns on request.

bench_model.py --peers runs this with the interpreter of an environment where the toolkit is
installed (torch and transformers come with it), so that turns alternate across processes. The first
line of its output says that it is ready: {"load_seconds": ..., "packages": {...}}. Then it answers
each line of its input with a number: "prefill 512" or "decode 128" with the seconds of one turn,
"weights 0" with the bytes of its weights. It waits idly in between, and ends with its input. Needs
nothing of ptq.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from model_turns import KINDS, Turns, own_memory, weight_bytes
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path, help="directory with a float model")
    parser.add_argument("--dtype", default="bfloat16", help="of the float model")
    parser.add_argument("--head", action="store_true", help="quantize the output head too")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True, help="tokens that a turn may take")
    return parser.parse_args()


def torchao(linear: nn.Linear, config: str) -> nn.Module:
    import torchao.quantization as package

    holder = nn.Sequential(linear)
    package.quantize_(holder, getattr(package, config)())
    return holder[0]


def quanto(linear: nn.Linear, weights: str) -> nn.Module:
    from optimum import quanto as package

    holder = nn.Sequential(linear)
    package.quantize(holder, weights=getattr(package, weights))
    package.freeze(holder)
    return holder[0]


def hqq(linear: nn.Linear, bits: int) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    return HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")


def bitsandbytes(linear: nn.Linear, bits: int) -> nn.Module:
    """With transformers' defaults; moving the weight to a device quantizes it."""
    import bitsandbytes as bnb

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    weight = linear.weight.data
    if bits == 8:
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=weight.dtype)
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    made.bias = linear.bias
    return made.to("cpu")


METHODS: dict[str, tuple[Callable[[nn.Linear], nn.Module], tuple[str, ...]]] = {
    "torchao-w8a8": (
        lambda linear: torchao(linear, "Int8DynamicActivationInt8WeightConfig"),
        ("torchao",),
    ),
    "torchao-w8a16": (lambda linear: torchao(linear, "Int8WeightOnlyConfig"), ("torchao",)),
    "quanto-w8a16": (lambda linear: quanto(linear, "qint8"), ("optimum-quanto",)),
    "quanto-w4a16": (lambda linear: quanto(linear, "qint4"), ("optimum-quanto",)),
    "hqq-w8a16-g64": (lambda linear: hqq(linear, 8), ("hqq",)),
    "hqq-w4a16-g64": (lambda linear: hqq(linear, 4), ("hqq",)),
    "bitsandbytes-w8a8": (lambda linear: bitsandbytes(linear, 8), ("bitsandbytes",)),
    "bitsandbytes-nf4": (lambda linear: bitsandbytes(linear, 4), ("bitsandbytes",)),
    "float": (
        lambda linear: linear,
        (),
    ),  # what a process of its own costs: nothing, if all is well
}
"""What each makes of a linear layer, and the packages that it needs."""


def warm_up(options: argparse.Namespace) -> None:
    """Import all that loading needs, which is not to be timed."""
    METHODS[options.method][0](nn.Linear(64, 64, dtype=getattr(torch, options.dtype)))
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))


@torch.no_grad()
def load(options: argparse.Namespace) -> nn.Module:
    """The float model with its layers replaced one at a time."""
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    model.requires_grad_(False)
    head = None if options.head else model.get_output_embeddings()
    make, _ = METHODS[options.method]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, make(module))
    return own_memory(model)


def answer(request: str, turns: Turns) -> Any:
    kind, tokens = request.split()
    if kind in KINDS:
        return turns(kind, int(tokens))
    return weight_bytes(turns.model)


def main() -> None:
    options = parse_arguments()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a toolkit prints is no answer
    torch.set_num_threads(options.threads)
    warm_up(options)
    start = time.perf_counter()
    turns = Turns(load(options), options.longest)
    seconds = time.perf_counter() - start
    packages = ("torch", "transformers", *METHODS[options.method][1])
    ready = {"load_seconds": seconds, "packages": {name: version(name) for name in packages}}
    print(json.dumps(ready), file=answers)
    for request in sys.stdin:
        print(json.dumps(answer(request, turns)), file=answers)


if __name__ == "__main__":
    main()
