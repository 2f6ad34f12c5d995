"""What a manifest says of a model: its quantized layers, and the versions that wrote it."""

import platform
from importlib import metadata

import torch
from torch import nn

from ptq.checkpoint.manifest import LayerEntry
from ptq.checkpoint.shard import dtype_name
from ptq.errors import CheckpointError
from ptq.modules import QuantEmbedding, QuantLinear, quantized_modules


def layer_entries(model: nn.Module) -> dict[str, LayerEntry]:
    """Of every quantized module, by its name.

    Raises:
        CheckpointError: there is none, or the model is itself one.
    """
    layers = {name: _layer(module) for name, module in quantized_modules(model).items()}
    if not layers:
        raise CheckpointError(
            f"nothing in this {type(model).__name__} is quantized; "
            "quantize it first, or save the float model with its own save_pretrained"
        )
    if "" in layers:
        raise CheckpointError("the model is a single QuantLinear; wrap it: nn.Sequential(layer)")
    return layers


def _layer(module: QuantLinear | QuantEmbedding) -> LayerEntry:
    if isinstance(module, QuantEmbedding):
        return LayerEntry(
            scheme=module.scheme,
            in_features=module.embedding_dim,
            out_features=module.num_embeddings,
            bias=None,
            kind="embedding",
        )
    return LayerEntry(
        scheme=module.scheme,
        in_features=module.in_features,
        out_features=module.out_features,
        bias=None if module.bias is None else dtype_name(module.bias.dtype),
    )


def versions() -> dict[str, str]:
    """Of ptq, torch, transformers, safetensors and python."""
    try:
        own = metadata.version("ptq-toolkit")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "ptq": own,
        "torch": str(torch.__version__),
        "transformers": metadata.version("transformers"),
        "safetensors": metadata.version("safetensors"),
        "python": platform.python_version(),
    }
