"""ptq: post-training quantization for PyTorch.

The story, in the order in which it is told::

    import ptq

    ptq.plan(model, "w4a16-g64")              # what would happen to every layer, and what it saves
    result = ptq.quantize(model, "w4a16-g64") # in place: nn.Linear becomes ptq.QuantLinear
    ptq.explain(model)                        # which kernel serves which layer, and why
    ptq.evaluate(model, text, tokenizer=tok)  # perplexity; against the float model, if given
    ptq.save(model, "out", tokenizer=tok)     # safetensors and a manifest with hashes
    model = ptq.load("out")                   # every tensor checked

``ptq.run(ptq.load_config("recipe.yaml"))`` does all of it. Importing ``ptq`` loads nothing but
``torch``; the rest is loaded at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq.checkpoint import load, save
    from ptq.config import QuantizationConfig, Scheme, load_config
    from ptq.errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        ModelError,
        PTQError,
        UnsupportedError,
    )
    from ptq.evaluation import evaluate
    from ptq.modules import QuantLinear
    from ptq.pipeline import quantize, run
    from ptq.planning import plan
    from ptq.report import explain
    from ptq.swap import dequantize

__version__ = "0.1.0"

_HOME = {
    "CalibrationError": "ptq.errors",
    "CheckpointError": "ptq.errors",
    "ConfigError": "ptq.errors",
    "ModelError": "ptq.errors",
    "PTQError": "ptq.errors",
    "QuantLinear": "ptq.modules",
    "QuantizationConfig": "ptq.config",
    "Scheme": "ptq.config",
    "UnsupportedError": "ptq.errors",
    "dequantize": "ptq.swap",
    "evaluate": "ptq.evaluation",
    "explain": "ptq.report",
    "load": "ptq.checkpoint",
    "load_config": "ptq.config",
    "plan": "ptq.planning",
    "quantize": "ptq.pipeline",
    "run": "ptq.pipeline",
    "save": "ptq.checkpoint",
}

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "ModelError",
    "PTQError",
    "QuantLinear",
    "QuantizationConfig",
    "Scheme",
    "UnsupportedError",
    "dequantize",
    "evaluate",
    "explain",
    "load",
    "load_config",
    "plan",
    "quantize",
    "run",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ptq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
