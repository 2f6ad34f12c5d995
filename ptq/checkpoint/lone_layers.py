"""The quantized layers of a checkpoint without the model around them."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ptq.checkpoint.manifest import LayerEntry, Manifest
from ptq.checkpoint.paths import inside
from ptq.checkpoint.shard import Stored, read_header, read_tensors
from ptq.checkpoint.slots import dtype_named
from ptq.modules import QuantEmbedding, QuantLinear

Layer = QuantLinear | QuantEmbedding


def lone_layers(
    root: Path, manifest: Manifest, device: torch.device
) -> Iterator[tuple[str, Layer]]:
    """Each quantized layer with its tensors, one in memory at a time, in the manifest's order.

    Raises:
        CheckpointError: a file or a tensor is missing or damaged.
    """
    headers = {shard: read_header(inside(root, shard)) for shard in manifest.shards}
    for name, entry in manifest.layers.items():
        layer = _empty(name, entry, manifest)
        layer.load_state_dict(
            {
                key: _read(root, manifest, headers, f"{name}.{key}").to(device)
                for key in layer.state_dict()
            },
            assign=True,
        )
        yield name, layer


def _empty(name: str, entry: LayerEntry, manifest: Manifest) -> Layer:
    if entry.kind == "embedding":
        dtype = dtype_named(manifest.tensors[_stored(manifest, f"{name}.like")].dtype)
        size = (entry.out_features, entry.in_features)
        return QuantEmbedding.on_meta(*size, entry.scheme, dtype)
    bias = None if entry.bias is None else dtype_named(entry.bias)
    return QuantLinear.on_meta(entry.in_features, entry.out_features, entry.scheme, bias)


def _stored(manifest: Manifest, key: str) -> str:
    return manifest.aliases.get(key, key)


def _read(
    root: Path, manifest: Manifest, headers: dict[str, dict[str, Stored]], key: str
) -> torch.Tensor:
    stored = _stored(manifest, key)
    shard = manifest.tensors[stored].shard
    ((_, tensor),) = read_tensors(root / shard, {stored: headers[shard][stored]})
    return tensor
