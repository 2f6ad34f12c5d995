"""The manifest of a checkpoint that transformers writes: in the header of each weight file.

``save_pretrained`` asks a quantizer for tensors and metadata, and writes config.json itself. So the
manifest has the tensors' hashes, but says nothing of other files; those are taken as they are.
"""

import json
from pathlib import Path

from torch import Tensor, nn

from ptq.checkpoint.account import layer_entries, versions
from ptq.checkpoint.hashing import file_entry, tensor_sha256
from ptq.checkpoint.json_file import json_object, read_json
from ptq.checkpoint.manifest import (
    CONFIG,
    FORMAT_VERSION,
    GENERATION_CONFIG,
    INDEX,
    WEIGHTS,
    FileEntry,
    Manifest,
    TensorEntry,
    class_name,
    seal,
)
from ptq.checkpoint.manifest_parse import parsed_manifest
from ptq.checkpoint.paths import inside, is_plain
from ptq.checkpoint.shard import dtype_name, read_header, read_metadata
from ptq.checkpoint.tensors import distinct_tensors
from ptq.errors import CheckpointError

METADATA_KEY = "ptq_manifest"
"""Of the manifest, in the metadata of a weight file."""


def embed(model: nn.Module) -> tuple[dict[str, Tensor], Manifest]:
    """The tensors of a quantized model, each once, and the manifest to be written with them.

    Raises:
        CheckpointError: nothing in the model is quantized, or a tensor cannot be stored.
    """
    tensors, aliases = distinct_tensors(model)
    entries = {
        key: TensorEntry(
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            sha256=tensor_sha256(tensor),
            shard="",  # the writer decides
        )
        for key, tensor in tensors.items()
    }
    manifest = seal(
        Manifest(
            format_version=FORMAT_VERSION,
            versions=versions(),
            model_class=class_name(type(model)),
            config=None,
            layers=layer_entries(model),
            aliases=aliases,
            tensors=entries,
            files={},
            total_tensor_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        )
    )
    return tensors, manifest


def metadata_of(manifest: Manifest) -> dict[str, str]:
    """The manifest as metadata of the weight files."""
    return {METADATA_KEY: json.dumps(manifest.model_dump(mode="json"))}


def embedded_manifest(root: Path) -> Manifest | None:
    """The manifest in the weight files of a directory, with their names; None if there is none.

    Raises:
        CheckpointError: it is damaged, or a tensor of it is in none of the files.
    """
    shards = _shards(root)
    if not shards:
        return None
    source = inside(root, shards[0])
    text = read_metadata(source).get(METADATA_KEY)
    if text is None:
        return None
    manifest = parsed_manifest(json_object(text, source), source)
    places = {key: shard for shard in shards for key in read_header(inside(root, shard))}
    for key in manifest.tensors:
        if key not in places:
            raise CheckpointError(
                f"tensor {key} is in none of the weight files of {root}; copy them again"
            )
    tensors = {
        key: entry.model_copy(update={"shard": places[key]})
        for key, entry in manifest.tensors.items()
    }
    return manifest.model_copy(update={"tensors": tensors, "files": _files(root)})


def _shards(root: Path) -> list[str]:
    """The weight files, as transformers chooses them; none if their index cannot be used."""
    if (root / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (root / INDEX).is_file():
        return []
    weight_map = read_json(inside(root, INDEX)).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    return sorted(set(names)) if all(map(is_plain, names)) else []


def _files(root: Path) -> dict[str, FileEntry]:
    names = (CONFIG, GENERATION_CONFIG, *(() if (root / WEIGHTS).is_file() else (INDEX,)))
    return {name: file_entry(inside(root, name)) for name in names if (root / name).is_file()}
