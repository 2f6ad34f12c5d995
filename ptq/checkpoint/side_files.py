"""The files of a checkpoint that are not tensors: configs, tokenizer, what the caller adds."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptq.checkpoint.hashing import file_entry
from ptq.checkpoint.manifest import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    MANIFEST,
    FileEntry,
)
from ptq.checkpoint.paths import is_plain
from ptq.checkpoint.shard import dtype_name
from ptq.errors import CheckpointError


def write_side_files(
    model: nn.Module,
    directory: Path,
    section: Mapping[str, Any],
    tokenizer: Any,
    extra_files: Mapping[str, str],
    carried: Mapping[str, Path],
) -> None:
    """Write config.json and generation_config.json of a transformers model, and the rest.

    Args:
        section: ``quantization_config`` of config.json.
        carried: files to copy, by their path in the directory.

    Raises:
        CheckpointError: an extra file has a name that cannot be used.
        OSError: a file exists or cannot be written.
    """
    if isinstance(model, PreTrainedModel):
        write_configs(model, directory, section)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    for name, text in extra_files.items():
        if not is_plain(name) or name in (MANIFEST, INDEX) or name.endswith(".safetensors"):
            raise CheckpointError(f"extra file {name!r}: choose another name, without directories")
        with (directory / name).open("x", encoding="utf-8") as file:
            file.write(text)
    copy_files(carried, directory)


def write_configs(model: PreTrainedModel, directory: Path, quantization: Mapping[str, Any]) -> None:
    """Write config.json, with this ``quantization_config``, and generation_config.json.

    Raises:
        OSError: a file cannot be written.
    """
    (directory / CONFIG).write_text(_config_json(model, quantization), encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:  # its save_pretrained refuses configs that the hub is full of
        text = generation.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
        (directory / GENERATION_CONFIG).write_text(text, encoding="utf-8")


def copy_files(files: Mapping[str, Path], directory: Path) -> None:
    """Copy files to where the directory has nothing yet, by their path below it.

    Raises:
        OSError: one exists or cannot be copied.
    """
    for name, source in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file, source.open("rb") as original:
            shutil.copyfileobj(original, file)


def _config_json(model: PreTrainedModel, quantization: Mapping[str, Any]) -> str:
    data = json.loads(model.config.to_json_string(use_diff=True))
    data["architectures"] = [type(model).__name__]
    data["quantization_config"] = dict(quantization)
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if dtypes:
        data["dtype"] = dtype_name(dtypes[0])
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def side_file_entries(directory: Path) -> dict[str, FileEntry]:
    """Every file below the directory that is not a shard."""
    return {
        path.relative_to(directory).as_posix(): file_entry(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".safetensors"
    }
