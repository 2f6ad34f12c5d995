#!/usr/bin/env python
"""Quantize a model's weights with another toolkit, in its own environment; write them dequantized.

bench_accuracy.py --peers runs this with the interpreter of an environment where the toolkit is
installed (torch, transformers and safetensors come with it), and evaluates the weights with its own
code. Needs nothing of ptq.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Tokens = list[list[int]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model", type=Path, help="directory with a float model and its tokenizer")
    parser.add_argument("tokens", type=Path, help="JSON file with a list of token ids a sample")
    parser.add_argument("output", type=Path, help="safetensors file for the weights")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--iterations", type=int, default=100, help="of auto-round")
    return parser.parse_args()


def llm_compressor(model: Any, tokens: Tokens, options: argparse.Namespace) -> Any:
    """GPTQ with its defaults, on the given tokens."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(
        num_bits=options.bits,
        type="int",
        symmetric=options.symmetric,
        strategy="group",
        group_size=options.group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=max(map(len, tokens)),
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    return model


def auto_round(model: Any, tokens: Tokens, options: argparse.Namespace) -> Any:
    """Signed gradient descent on the given tokens."""
    from auto_round import AutoRound

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    loader = [{"input_ids": torch.tensor([row])} for row in tokens]
    rounder = AutoRound(
        model,
        tokenizer,
        bits=options.bits,
        group_size=options.group_size,
        sym=options.symmetric,
        iters=options.iterations,
        dataset=loader,
        seqlen=max(map(len, tokens)),
        nsamples=len(tokens),
        batch_size=8,
        device_map="cpu",
    )
    return rounder.quantize()[0]


def hqq(model: Any, _: Tokens, options: argparse.Namespace) -> Any:
    """Half-quadratic quantization, which looks at weights only (always with zero points)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=options.bits, group_size=options.group_size)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            copy = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            copy.weight.data.copy_(module.weight.data)
            made = HQQLinear(copy, config, compute_dtype=torch.float32, device="cpu")
            module.weight.data.copy_(made.dequantize())
    return model


PEERS: dict[str, Callable[[Any, Tokens, argparse.Namespace], Any]] = {
    "llm-compressor": llm_compressor,
    "auto-round": auto_round,
    "hqq": hqq,
}
PACKAGES = {"llm-compressor": "llmcompressor", "auto-round": "auto-round", "hqq": "hqq"}


def main() -> None:
    options = parse_arguments()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokens = json.loads(options.tokens.read_text(encoding="utf-8"))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    start = time.perf_counter()
    made = PEERS[options.peer](model, tokens, options)
    seconds = time.perf_counter() - start
    weights = {
        f"{name}.weight": made.get_submodule(name).weight.detach().float().contiguous()
        for name in linears
        if name != "lm_head"
    }
    save_file(weights, options.output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"seconds": seconds, "peak_memory_bytes": peak}
    print(json.dumps({**figures, "version": version(PACKAGES[options.peer])}))


if __name__ == "__main__":
    main()
