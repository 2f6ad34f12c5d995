#!/usr/bin/env python
"""Make or read checkpoints in the compressed-tensors format with the peer's own packages.

check_interop.py runs this with the interpreter of an environment that has llm-compressor. Needs
nothing of ptq.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

_TOKEN = {"strategy": "token", "dynamic": True}
_STATIC = {"strategy": "tensor", "dynamic": False}
MADE = {
    "w8a8": ("rtn", "int8", "channel", None, True, _TOKEN),
    "w4a16-g32": ("rtn", "int4", "group", 32, True, None),
    "w4a16-g128-asym": ("rtn", "int4", "group", 128, False, None),
    "w4a16-g64 (gptq)": ("gptq", "int4", "group", 64, True, None),
    "w4a16-g64-asym (gptq, act-order weight)": ("weight", "int4", "group", 64, False, None),
    "w4a16-g64 (gptq, act-order static)": ("static", "int4", "group", 64, True, None),
    "w8a8-static": ("rtn", "int8", "channel", None, True, _STATIC),
    "w8a16": ("rtn", "int8", "channel", None, True, None),
    "w4a16-asym": ("rtn", "int4", "channel", None, False, None),
    "fp8": ("rtn", "float8", "channel", None, True, _TOKEN),
    "fp8-a16": ("rtn", "float8", "channel", None, True, None),
}
"""How (round to nearest, or GPTQ with an order of the columns), numbers, strategy, group size,
symmetric, activations."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("make", "read"))
    parser.add_argument("directory", type=Path, help="the checkpoint to make or read")
    parser.add_argument("--model", type=Path, help="make: the float model")
    parser.add_argument("--scheme", choices=MADE, help="make: how to quantize it")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: rows of token ids")
    parser.add_argument("--output", type=Path, required=True, help="file for logits and weights")
    return parser.parse_args()


def make(options: argparse.Namespace, rows: list[list[int]]) -> None:
    """Quantize a float model with llm-compressor, and save it as it does."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))  # not used, but asked for
    how, number, strategy, size, symmetric, inputs = MADE[options.scheme]
    kind, bits = number.rstrip("48"), int(number[-1])
    weights = QuantizationArgs(
        num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, group_size=size
    )
    activations = None if inputs is None else QuantizationArgs(num_bits=8, type=kind, **inputs)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    orders = {"gptq": None, "weight": "weight", "static": "static"}
    modifier = (
        partial(GPTQModifier, actorder=orders[how]) if how in orders else QuantizationModifier
    )
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"))
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    oneshot(
        model=model,
        dataset=Dataset.from_list(data),
        processor=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a"),
        recipe=modifier(config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*mlp[.]gate$"]),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(options.directory, save_compressed=True)


def decompressed(directory: Path) -> dict[str, torch.Tensor]:
    """Each quantized weight in float, by the compressor that the format names."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config)
    stored: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        stored |= load_file(shard)
    weights = {}
    linear = torch.nn.Linear(1, 1)
    for name in sorted({key.rpartition(".")[0] for key in stored if key.endswith("weight_scale")}):
        schemes = groups.config_groups.values()
        scheme = next(s for s in schemes if is_match(name, linear, s.targets, groups.ignore))
        compressor = BaseCompressor.get_value_from_registry(scheme.format or groups.format)
        own = {k[len(name) + 1 :]: t for k, t in stored.items() if k.startswith(f"{name}.")}
        weights[f"{name}.weight"] = compressor.decompress(own, scheme)["weight"].contiguous()
    return weights


def logits(directory: Path, rows: list[list[int]]) -> tuple[torch.Tensor, str]:
    """What transformers computes with the checkpoint in float32, and how it had to be loaded."""
    from transformers import CompressedTensorsConfig

    dequantized = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    options = {"dtype": torch.float32, "output_loading_info": True}
    try:
        how = "as it is"
        model, info = AutoModelForCausalLM.from_pretrained(directory, **options)
    except (RuntimeError, ValueError) as error:  # zero points along N: shapes that do not match
        how = f"dequantize=True ({str(error).splitlines()[0][:60]})"
        model, info = AutoModelForCausalLM.from_pretrained(directory, **options, **dequantized)
    if info["missing_keys"]:  # fused experts
        how = "dequantize=True (experts)"
        model, info = AutoModelForCausalLM.from_pretrained(directory, **options, **dequantized)
    if info["missing_keys"]:
        how = f"not: {len(info['missing_keys'])} keys missing"
    torch.nn.Module.float(model)  # experts and routers have come in the dtype of the files
    with torch.no_grad():
        return model(torch.tensor(rows)).logits.float(), how


def main() -> None:
    options = parse_arguments()
    rows = json.loads(options.tokens.read_text(encoding="utf-8"))
    if options.action == "make":
        make(options, rows)
    tensors: dict[str, Any] = decompressed(options.directory)
    tensors["logits"], how = logits(options.directory, rows)
    save_file(tensors, options.output)
    print(json.dumps({"loaded": how}))


if __name__ == "__main__":
    main()
