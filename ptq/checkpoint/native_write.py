"""Writing the native checkpoint."""

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptq.checkpoint.atomic import replacing
from ptq.checkpoint.manifest import (
    FORMAT_VERSION,
    LayerEntry,
    Manifest,
    class_name,
    seal,
    write_manifest,
)
from ptq.checkpoint.shard import Elsewhere, dtype_name
from ptq.checkpoint.shards import write_shards
from ptq.checkpoint.side_files import side_file_entries, write_side_files
from ptq.checkpoint.target import check_target
from ptq.checkpoint.tensors import distinct_tensors
from ptq.config import QuantizationConfig
from ptq.errors import CheckpointError
from ptq.modules import QuantEmbedding, QuantLinear, quantized_modules


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    config: QuantizationConfig | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
    extra_files: Mapping[str, str] | None = None,
    carried: Mapping[str, Path] | None = None,
    elsewhere: Elsewhere | None = None,
) -> Manifest:
    """Write a quantized model to a directory: safetensors, config.json and a manifest.

    The directory appears whole or not at all; an old checkpoint stays until the new one is
    complete. Only tensors, JSON and the tokenizer's own files are written, no pickle.

    Args:
        config: what the model was quantized with, for the manifest.
        tokenizer: a transformers tokenizer or processor to carry along.
        overwrite: replace an existing ptq checkpoint; nothing else is ever replaced.
        shard_bytes: tensor bytes in one file at most; a larger tensor has a file of its own.
        extra_files: name to text of further files, such as a README.md.
        carried: name in the checkpoint (with ``/``) to a file that is copied as it is.
        elsewhere: for tensors on the meta device, by their names: what reads the values, one
            tensor at a time as it is written. For models larger than memory.

    Raises:
        CheckpointError: nothing in the model is quantized, a tensor cannot be stored, the
            directory cannot be used, or the disk is full.
    """
    layers = _layers(model)
    elsewhere = elsewhere or {}
    tensors, aliases = distinct_tensors(model, elsewhere.keys())
    if shard_bytes < 1:
        raise CheckpointError(f"shard_bytes is {shard_bytes}; give a positive number of bytes")
    total = sum(tensor.nbytes for tensor in tensors.values())
    target = check_target(directory, overwrite, total)
    try:
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
        with replacing(target, overwrite) as tmp:
            write_side_files(model, tmp, tokenizer, extra_files or {}, carried or {})
            entries = write_shards(tensors, tmp, shard_bytes, total, elsewhere)
            manifest = seal(
                Manifest(
                    format_version=FORMAT_VERSION,
                    versions=_versions(),
                    model_class=class_name(type(model)),
                    config=None if config is None else config.model_dump(mode="json"),
                    layers=layers,
                    aliases=aliases,
                    tensors=entries,
                    files=side_file_entries(tmp),
                    total_tensor_bytes=total,
                )
            )
            write_manifest(manifest, tmp)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {target} ({total / 1e6:,.0f} MB) could not be written: {error}; "
            "what was there is unchanged; free some space, or choose another directory"
        ) from error
    return manifest


def _layers(model: nn.Module) -> dict[str, LayerEntry]:
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


def _versions() -> dict[str, str]:
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
