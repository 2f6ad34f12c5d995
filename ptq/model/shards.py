"""The safetensors files of a model: which tensor is in which, without reading any."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ptq.errors import ModelError, UnsupportedError
from ptq.model.source import ModelSource

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_files(source: ModelSource) -> dict[str, Path]:
    """The name of every tensor of a model, and the file that holds it; headers are read only.

    Raises:
        UnsupportedError: the model is not in safetensors files.
        ModelError: a file is missing or damaged.
    """
    if source.gguf_file is not None:
        raise UnsupportedError(
            f"model {source}: only safetensors files can be streamed, not GGUF; "
            "set model.stream: false"
        )
    files: dict[str, Path] = {}
    for shard in _shards(source):
        try:
            with safe_open(shard, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), shard)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{shard} is not a whole safetensors file ({error}); download it again"
            ) from None
    return files


def stored_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """dtype of the first float tensor; float32 if there is none."""
    for key, shard in files.items():
        with safe_open(shard, framework="pt") as file:
            name = file.get_slice(key).get_dtype()
        if name in _FLOATS:
            return _FLOATS[name]
    return torch.float32


def _shards(source: ModelSource) -> list[Path]:
    single = _find(source, SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    index = _find(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise UnsupportedError(
            f"model {source} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, so it "
            "cannot be streamed; set model.stream: false"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of safetensors files: {error!r}") from None
    shards = {name: _find(source, name) for name in names}
    found = [shard for shard in shards.values() if shard is not None]
    missing = [name for name, shard in shards.items() if shard is None]
    if missing:
        raise ModelError(f"model {source}: its index names {missing[0]}, which is not there")
    return found


def _find(source: ModelSource, name: str) -> Path | None:
    """The file of this name: in the directory, or in the hub's cache (downloaded if it must be)."""
    try:
        found = cached_file(
            source.path,
            name,
            revision=source.options.revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        raise ModelError(f"model {source}: {str(error).splitlines()[0]}") from None
    return None if found is None else Path(found)
