"""Quantized checkpoints of other toolkits: recognised by their config.json."""

from pathlib import Path
from typing import Any

from ptq.checkpoint.json_file import read_json
from ptq.checkpoint.manifest import CONFIG
from ptq.checkpoint.paths import inside

_FLOAT = "quantize the float model that it was made from: ptq.quantize"
REMEDIES = {
    "bitsandbytes": f"its codes are nf4, fp4 or int8 in blocks of its own; {_FLOAT}",
    "torchao": f"it stores tensor subclasses; {_FLOAT}",
    "hqq": f"its zero points are fractions, which no integer format holds; {_FLOAT}",
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
    """The name of the format; bitsandbytes did not always write it."""
    if any(quantization.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    name = quantization.get("quant_method")
    return name if isinstance(name, str) else None
