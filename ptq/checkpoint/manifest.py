"""ptq_manifest.json: what a checkpoint holds, so that everything in it can be checked."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ptq.config import Scheme

MANIFEST = "ptq_manifest.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
FORMAT_VERSION = 1


class Entry(BaseModel):
    """Base of the manifest's parts: immutable, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorEntry(Entry):
    """One stored tensor: ``dtype`` as in ``"bfloat16"``, ``sha256`` of its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    shard: str


class LayerEntry(Entry):
    """One quantized module.

    Args:
        in_features, out_features: of a QuantLinear; of a QuantEmbedding, the length and the
            number of its rows.
        bias: dtype of the bias, or None.
        kind: which of the two it is.
    """

    scheme: Scheme
    in_features: int
    out_features: int
    bias: str | None
    kind: Literal["linear", "embedding"] = "linear"


class FileEntry(Entry):
    """A file that is not a shard."""

    bytes: int
    sha256: str


class Manifest(Entry):
    """Everything that a checkpoint says about itself.

    Args:
        versions: of ptq, torch, transformers, safetensors and python, when it was written.
        model_class: with its module, as in ``transformers.models.llama...LlamaForCausalLM``.
        config: the resolved QuantizationConfig, or None.
        layers: by module name.
        aliases: further names of stored tensors (tied weights), each to the stored name.
        tensors: by their name in ``state_dict()``.
        files: by path inside the checkpoint, with ``/``.
        total_tensor_bytes: of all stored tensors.
        manifest_sha256: of the canonical JSON of everything else.
    """

    format_version: int
    versions: dict[str, str]
    model_class: str
    config: dict[str, Any] | None
    layers: dict[str, LayerEntry]
    aliases: dict[str, str]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    total_tensor_bytes: int
    manifest_sha256: str = ""

    @property
    def identity(self) -> str:
        """:func:`identity` of the model."""
        return identity(self.layers, {key: entry.sha256 for key, entry in self.tensors.items()})

    @property
    def shards(self) -> tuple[str, ...]:
        """The file names of the shards, sorted."""
        return tuple(sorted({entry.shard for entry in self.tensors.values()}))

    def in_shard(self, shard: str) -> dict[str, TensorEntry]:
        """The tensors of one shard."""
        return {key: entry for key, entry in self.tensors.items() if entry.shard == shard}


def class_name(cls: type) -> str:
    """The class with its module, as ``model_class`` has it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def canonical_sha256(data: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces) without ``manifest_sha256``."""
    rest = {key: value for key, value in data.items() if key != "manifest_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def identity(layers: Mapping[str, LayerEntry], tensors: Mapping[str, str]) -> str:
    """A hash by which two quantized models are the same: of the layers, with their schemes, and of
    the SHA-256 of each tensor, by name."""
    kinds = {name: entry.model_dump(mode="json") for name, entry in layers.items()}
    return canonical_sha256({"layers": kinds, "tensors": dict(tensors)})


def seal(manifest: Manifest) -> Manifest:
    """The manifest with its hash filled in."""
    data = json.loads(json.dumps(manifest.model_dump(mode="json")))
    return manifest.model_copy(update={"manifest_sha256": canonical_sha256(data)})


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write a sealed manifest.

    Raises:
        OSError: it exists or cannot be written.
    """
    with (directory / MANIFEST).open("x", encoding="utf-8") as file:
        json.dump(manifest.model_dump(mode="json"), file, indent=1)
        file.write("\n")
