"""GPTQ and AWQ files by the definition of the layouts, code by code in Python's integers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq.modules import QuantLinear

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values: list[int], bits: int) -> list[int]:
    """Values without sign as 32-bit words: value j at the bits from j * bits, low end first."""
    number = sum(value << (bits * j) for j, value in enumerate(values))
    found = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(values) * bits // 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in found]


def values(found: list[int], count: int, bits: int) -> list[int]:
    """The inverse of :func:`words`."""
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(found))
    return [(number >> (bits * j)) & ((1 << bits) - 1) for j in range(count)]


def shuffled(row: list[int]) -> list[int]:
    """A row in AWQ's order: nibble i of a word holds column AWQ_COLUMNS[i] of its eight."""
    return [row[j - j % 8 + AWQ_COLUMNS[j % 8]] for j in range(len(row))]


def packed(codes: Tensor, zeros: Tensor, bits: int, layout: str) -> dict[str, Tensor]:
    """qweight and qzeros of codes [N, K] and zero points [N, G], both without sign."""
    across = zeros.t().tolist()
    if layout == "awq":
        qweight = [words(shuffled(row), bits) for row in codes.t().tolist()]
        qzeros = [words(shuffled(row), bits) for row in across]
    else:
        less = 1 if layout == "gptq" else 0
        columns = [words(row, bits) for row in codes.tolist()]
        qweight = torch.tensor(columns, dtype=torch.int32).t().tolist()
        qzeros = [words([zero - less for zero in row], bits) for row in across]
    return {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
    }


def layer_tensors(layer: QuantLinear, layout: str) -> dict[str, Tensor]:
    """All tensors of a layer."""
    weight, bits = layer.quantized_weight, layer.scheme.weights.int_format.bits
    middle, (_, columns) = 1 << (bits - 1), weight.shape
    zeros = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    made = packed(weight.codes.int() + middle, zeros.int() + middle, bits, layout)
    made["scales"] = weight.scale.t().contiguous()
    if layout != "awq":
        size = layer.scheme.weights.group_size or columns
        made["g_idx"] = torch.tensor([k // size for k in range(columns)], dtype=torch.int32)
    return made


def write(model: nn.Module, directory: Path, layout: str, **config: Any) -> dict[str, Tensor]:
    """A checkpoint of a model whose layers have one scheme; ``config`` adds to its section."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    own = {f"{name}.{key}" for name, m in layers.items() for key in m.state_dict()}
    own -= {f"{name}.bias" for name in layers}
    tensors = {k: v for k, v in tensors.items() if k not in own}
    for name, layer in layers.items():
        made = layer_tensors(layer, layout)
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    weights = next(iter(layers.values())).scheme.weights
    section: dict[str, Any] = {
        "bits": weights.int_format.bits,
        "group_size": -1 if weights.group_size is None else weights.group_size,
    }
    if layout == "awq":
        section |= {"quant_method": "awq", "version": "gemm", "zero_point": True}
    else:
        version = {"gptq": "gptq", "gptq-v2": "gptq_v2"}[layout]
        section |= {"quant_method": "gptq", "checkpoint_format": version, "desc_act": False}
        section |= {"sym": weights.symmetric, "damp_percent": 0.01, "true_sequential": True}
    data = json.loads(model.config.to_json_string(use_diff=True))
    data |= {"architectures": [type(model).__name__], "quantization_config": section | config}
    (directory / "config.json").write_text(json.dumps(data))
    return tensors
