"""Quantized checkpoints of other toolkits: recognised by their config.json."""

from pathlib import Path
from typing import Any

from ptq.checkpoint.json_file import read_json
from ptq.checkpoint.manifest import CONFIG
from ptq.checkpoint.paths import inside

_FLOAT = "quantize the float model that it was made from: ptq.quantize"
_DEQUANTIZE = (
    "load it with transformers, which dequantizes it (dequantize=True in its config class), "
    "save that, and quantize it"
)
_BLOCKS = "its codes are floating-point numbers with a scale a block, which ptq does not have"
_CODEBOOK = "its codes are places in a codebook, not numbers"
REMEDIES = {
    "aqlm": f"{_CODEBOOK}; {_FLOAT}",
    "auto-round": "export it with AutoRound as auto_gptq or auto_awq, which ptq reads; "
    f"or {_FLOAT}",
    "bitnet": f"its weights are ternary, and were trained so; {_FLOAT}",
    "bitsandbytes": f"its codes are nf4, fp4 or int8 in blocks of its own; {_FLOAT}",
    "eetq": f"its int8 codes are in the order of one CUDA kernel; {_FLOAT} with w8a16",
    "fbgemm_fp8": f"its fp8 weights are for kernels of FBGEMM; {_FLOAT} with fp8",
    "fouroversix": f"{_BLOCKS}; {_FLOAT}",
    "fp8": f"{_BLOCKS}; {_DEQUANTIZE} with fp8",
    "fp_quant": f"{_BLOCKS}, of rotated weights; {_FLOAT}",
    "gemma": f"it is a format of its own; {_FLOAT}",
    "gguf": "give the .gguf file as the model, which is dequantized, and quantize that: "
    "ptq.load_float(FILE)",
    "higgs": f"{_CODEBOOK}, of rotated weights; {_FLOAT}",
    "hqq": f"its zero points are fractions, which no integer format holds; {_FLOAT}",
    "metal": f"its codes are in the order of Apple's kernels; {_FLOAT} with w4a16-g64-asym",
    "modelopt": f"it is for NVIDIA's engines; {_FLOAT}",
    "mxfp4": f"{_BLOCKS}; {_DEQUANTIZE} with w4a16-g32",
    "mxfp8": f"{_BLOCKS}; {_FLOAT} with fp8",
    "nvfp4": f"{_BLOCKS}; {_FLOAT}",
    "quanto": f"it stores tensor subclasses; {_FLOAT}",
    "quark": f"it has schemes and packing of its own; {_FLOAT}",
    "sinq": f"its weights have scales for rows and columns at once; {_FLOAT}",
    "spqr": f"it keeps outliers beside its codes; {_FLOAT}",
    "torchao": f"it stores tensor subclasses; {_FLOAT}",
    "vptq": f"{_CODEBOOK}; {_FLOAT}",
}
"""What to do with a format that ptq knows by name and does not read."""
READ = ("compressed-tensors", "gptq", "awq")
"""Formats of others that ptq reads, by ``quant_method``."""


def quantization_of(root: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a directory; empty if it has none.

    Raises:
        CheckpointError: config.json is not JSON.
    """
    if not (root / CONFIG).is_file():
        return {}
    found = read_json(inside(root, CONFIG)).get("quantization_config")
    return found if isinstance(found, dict) else {}


def method_of(quantization: dict[str, Any]) -> str | None:
    """The name of the format; bitsandbytes did not always write it, or with its bits."""
    if any(quantization.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    name = quantization.get("quant_method")
    if not isinstance(name, str):
        return None
    return "bitsandbytes" if name.startswith("bitsandbytes_") else name
