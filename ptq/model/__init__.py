"""Finding, loading and reading models; nothing here quantizes."""

from ptq.model.layers import (
    LayerInfo,
    cast_parameters,
    check_finite,
    read_layers,
    replace_module,
)
from ptq.model.skeleton import fill_computed_buffers, skeleton
from ptq.model.source import (
    ModelSource,
    load_float,
    load_model,
    load_model_config,
    load_tokenizer,
)

__all__ = [
    "LayerInfo",
    "ModelSource",
    "cast_parameters",
    "check_finite",
    "fill_computed_buffers",
    "load_float",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "read_layers",
    "replace_module",
    "skeleton",
]
