#!/usr/bin/env python
"""Make, read and pack GPTQ and AWQ checkpoints with GPTQModel.

check_interop.py runs this with the interpreter of an environment that has gptqmodel, optimum and
accelerate. Needs nothing of ptq.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it would compile its kernels
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # fewer than two are an error

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig, PreTrainedTokenizerFast

MADE: dict[str, dict[str, Any]] = {
    "gptq w4a16-g64": {"bits": 4, "group_size": 64},
    "gptq w8a16-g32": {"bits": 8, "group_size": 32},
    "gptq w4a16": {"bits": 4, "group_size": -1, "act_group_aware": False},
    "gptq-v2 w4a16-g64-asym": {
        "bits": 4, "group_size": 64, "sym": False, "format": FORMAT.GPTQ_V2,
    },
    "gptq w4a16-g64-asym": {"bits": 4, "group_size": 64, "sym": False, "format": FORMAT.GPTQ},
    "gptq w4a16-g64 (act-order)": {
        "bits": 4, "group_size": 64, "desc_act": True, "act_group_aware": False,
    },
    "awq w4a16-g64-asym": {
        "bits": 4, "group_size": 64, "sym": False, "quant_method": METHOD.AWQ,
        "format": FORMAT.GEMM,
    },
}  # fmt: skip
"""What of a QuantizeConfig."""


def absolute(text: str) -> Path:
    """A path that stays the same wherever this runs."""
    return Path(text).absolute()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("make", "read"))
    parser.add_argument("directory", type=absolute, help="the checkpoint to make or read")
    parser.add_argument("--model", type=absolute, help="make: the float model")
    parser.add_argument("--scheme", choices=MADE, help="make: how to quantize it")
    parser.add_argument("--weights", type=absolute, help="read: float weights to pack as well")
    parser.add_argument("--tokens", type=absolute, required=True, help="JSON: rows of token ids")
    parser.add_argument(
        "--output", type=absolute, required=True, help="file for logits and weights"
    )
    return parser.parse_args()


def make(options: argparse.Namespace, rows: list[list[int]]) -> None:
    """Quantize a float model with GPTQModel, and save it as it does."""
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))  # not used, but asked for
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="a")
    tokenizer.save_pretrained(options.model)
    config = QuantizeConfig(**{"desc_act": False, **MADE[options.scheme]})
    model = GPTQModel.load(str(options.model), config, device="cpu")
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(data, batch_size=1, backend=BACKEND.TORCH)
    model.save(str(options.directory))


def section(directory: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint."""
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found["quantization_config"]


def load(directory: Path) -> Any:
    """The checkpoint as transformers loads it, on GPTQModel's kernels in plain torch."""
    found = section(directory)
    if found["quant_method"] == "awq":
        config = AwqConfig(bits=found["bits"], backend="torch_awq")
    else:
        config = GPTQConfig(bits=found["bits"], backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float16, device_map="cpu", quantization_config=config
    )


def dequantized(module: Any) -> torch.Tensor:
    """The weight [out, in] of one of GPTQModel's layers, float16."""
    if isinstance(module, TorchLinear):
        return module.dequantize_weight().t().contiguous()
    tensors = module.qweight, module.qzeros, module.scales
    return dequantize_gemm(*tensors, module.bits, module.group_size).t().contiguous()


def packed(directory: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What GPTQModel packs of weights, scales and zero points, in the checkpoint's layout."""
    found, made = section(directory), {}
    for name in sorted({key.rpartition(".")[0] for key in weights}):
        weight, scales, zeros = (weights[f"{name}.{key}"] for key in ("weight", "scales", "zeros"))
        rows, columns = weight.shape
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        awq = found["quant_method"] == "awq"
        module = (AwqTorchLinear if awq else TorchLinear)(
            bits=found["bits"],
            group_size=found["group_size"],
            sym=found.get("sym", False),
            desc_act=False,
            in_features=columns,
            out_features=rows,
            register_buffers=True,
        )
        if awq:
            module.pack(linear, scales, zeros)
        else:
            groups = torch.arange(columns) // (columns // scales.shape[1])
            module.pack_original(linear, scales, zeros, groups.to(torch.int32))
            if found["checkpoint_format"] == "gptq":
                convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=found["bits"]))
        made |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return made


@torch.no_grad()
def main() -> None:
    options = parse_arguments()
    os.chdir(options.directory.parent)  # GPTQModel writes its logs to where it runs
    rows = json.loads(options.tokens.read_text(encoding="utf-8"))
    if options.action == "make":
        make(options, rows)
    tensors: dict[str, torch.Tensor] = {}
    if options.weights is not None:
        made = packed(options.directory, load_file(options.weights))
        tensors |= {f"packed.{key}": value.contiguous() for key, value in made.items()}
    model = load(options.directory)
    tensors["logits"] = model(torch.tensor(rows)).logits.float()
    kinds = set()
    for name, module in model.named_modules():
        if isinstance(module, TorchLinear | AwqTorchLinear):
            kinds.add(type(module).__name__)
            tensors[f"{name}.weight"] = dequantized(module)
    save_file(tensors, options.output)
    print(json.dumps({"loaded": ", ".join(kinds)}), flush=True)


if __name__ == "__main__":
    main()
