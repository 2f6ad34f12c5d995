"""The safetensors files of a checkpoint: one, or several with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ptq.checkpoint.manifest import INDEX, WEIGHTS, TensorEntry
from ptq.checkpoint.shard import Elsewhere, dtype_name, file_bytes, write_shard


def write_shards(
    tensors: Mapping[str, Tensor],
    directory: Path,
    shard_bytes: int,
    total: int,
    elsewhere: Elsewhere,
    *,
    hashed: bool = False,
) -> dict[str, TensorEntry]:
    """Write tensors as one file or, with an index, several; returns what each file holds.

    Args:
        shard_bytes: tensor bytes in one file at most; a larger tensor has a file of its own.
        total: bytes of all tensors.
        elsewhere: for tensors on the meta device: what reads the values, as they are written.
        hashed: put the hashes into the files' headers.

    Raises:
        OSError: a file exists or cannot be written.
    """
    shards = _divide({key: tensor.nbytes for key, tensor in tensors.items()}, shard_bytes)
    entries = {}
    for number, keys in enumerate(shards, 1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        chosen = {key: tensors[key] for key in keys}
        hashes = write_shard(directory / name, chosen, elsewhere, hashed=hashed)
        for key in keys:
            entries[key] = TensorEntry(
                dtype=dtype_name(tensors[key].dtype),
                shape=tuple(tensors[key].shape),
                sha256=hashes[key],
                shard=name,
            )
    if len(shards) > 1:
        weight_map = {key: entries[key].shard for key in sorted(entries)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return entries


def shard_bytes(tensors: Mapping[str, Tensor], limit: int) -> list[int]:
    """Sizes of the files, with hashes in their headers, that :func:`write_shards` makes of these
    tensors, which need no values."""
    shards = _divide({key: tensor.nbytes for key, tensor in tensors.items()}, limit)
    return [file_bytes({key: tensors[key] for key in keys}) for keys in shards]


def _divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Consecutive keys, up to ``limit`` bytes together; one that is larger stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards
