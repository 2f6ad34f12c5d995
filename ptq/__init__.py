"""ptq: post-training quantization for PyTorch.

The story, in the order in which it is told::

    import ptq

    model, tokenizer = ptq.load_float("org/model")  # or any nn.Module of yours
    ptq.plan(model, "w4a16-g64")              # what would happen to every layer, and what it saves
    ptq.search(model, "4.5 bits", data="text.txt", tokenizer=tokenizer)  # a scheme for each layer
    result = ptq.quantize(model, "w4a16-g64") # in place: nn.Linear becomes ptq.QuantLinear
    ptq.explain(model)                        # which kernel serves which layer, and why
    ptq.tune(model)                           # measure the kernels here, use the fastest
    ptq.compile(model)                        # model.generate decodes through one compiled graph
    ptq.quantize_cache(model, "int4")         # model.generate keeps keys and values as integers
    ptq.evaluate(model, "text.txt", tokenizer=tokenizer)  # perplexity
    ptq.diagnose(float_model, "text.txt", model, tokenizer=tokenizer)  # which layers do damage
    ptq.save(model, "out", tokenizer=tokenizer)  # safetensors and a manifest with hashes
    model = ptq.load("out")                   # every tensor checked
    model = transformers.AutoModelForCausalLM.from_pretrained("out")  # once ptq is imported

``ptq.run(ptq.load_config("recipe.yaml"))`` does all of it. Importing ``ptq`` loads
neither torch nor transformers; they are loaded at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ptq.huggingface.register import register_when_loaded

if TYPE_CHECKING:
    from ptq.checkpoint import load, save
    from ptq.compilation import compile_model as compile
    from ptq.config import QuantizationConfig, Scheme, load_config
    from ptq.diagnosis import diagnose
    from ptq.errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        ModelError,
        PTQError,
        UnsupportedError,
    )
    from ptq.evaluation import evaluate
    from ptq.kv_cache import QuantizedCache, quantize_cache
    from ptq.mixed_precision import search
    from ptq.model import load_float
    from ptq.modules import QuantEmbedding, QuantLinear
    from ptq.native import build_kernels
    from ptq.pipeline import quantize, run
    from ptq.planning import plan
    from ptq.report import explain
    from ptq.report.page import report_page
    from ptq.swap import dequantize
    from ptq.tuning import tune

__version__ = "0.1.0"

_HOME = {
    "CalibrationError": "ptq.errors",
    "CheckpointError": "ptq.errors",
    "ConfigError": "ptq.errors",
    "ModelError": "ptq.errors",
    "PTQError": "ptq.errors",
    "QuantEmbedding": "ptq.modules",
    "QuantLinear": "ptq.modules",
    "QuantizedCache": "ptq.kv_cache",
    "QuantizationConfig": "ptq.config",
    "Scheme": "ptq.config",
    "UnsupportedError": "ptq.errors",
    "build_kernels": "ptq.native",
    "compile": "ptq.compilation",
    "dequantize": "ptq.swap",
    "diagnose": "ptq.diagnosis",
    "evaluate": "ptq.evaluation",
    "explain": "ptq.report",
    "load": "ptq.checkpoint",
    "load_config": "ptq.config",
    "load_float": "ptq.model",
    "plan": "ptq.planning",
    "quantize": "ptq.pipeline",
    "quantize_cache": "ptq.kv_cache",
    "report_page": "ptq.report.page",
    "run": "ptq.pipeline",
    "save": "ptq.checkpoint",
    "search": "ptq.mixed_precision",
    "tune": "ptq.tuning",
}

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "ModelError",
    "PTQError",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizationConfig",
    "QuantizedCache",
    "Scheme",
    "UnsupportedError",
    "build_kernels",
    "compile",
    "dequantize",
    "diagnose",
    "evaluate",
    "explain",
    "load",
    "load_config",
    "load_float",
    "plan",
    "quantize",
    "quantize_cache",
    "report_page",
    "run",
    "save",
    "search",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ptq' has no attribute {name!r}")
    # ``compile`` is also a builtin: the function has a name of its own where it is defined.
    own = {"compile": "compile_model"}.get(name, name)
    return getattr(importlib.import_module(_HOME[name]), own)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_loaded()
