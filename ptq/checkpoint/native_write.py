"""Writing the native checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ptq.checkpoint.account import layer_entries, versions
from ptq.checkpoint.atomic import replacing
from ptq.checkpoint.card import CARD, card_of
from ptq.checkpoint.description import describe
from ptq.checkpoint.manifest import (
    FORMAT_VERSION,
    Manifest,
    class_name,
    identity,
    seal,
    write_manifest,
)
from ptq.checkpoint.shard import Elsewhere
from ptq.checkpoint.shards import write_shards
from ptq.checkpoint.side_files import side_file_entries, write_side_files
from ptq.checkpoint.target import check_target
from ptq.checkpoint.tensors import distinct_tensors
from ptq.checkpoint.written import Verify, check_how, verify_written
from ptq.config import QuantizationConfig
from ptq.errors import CheckpointError
from ptq.kv_cache import cache_settings


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
    verify: Verify = "files",
    say: Callable[[str], object] = lambda text: None,
    card: bool = True,
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
        verify: what has to be right before the directory appears. ``files``: every byte is read
            back and compared with the hash of what was in memory. ``process``: besides, a fresh
            process loads the checkpoint and computes the same outputs bit for bit, which takes some
            seconds more (:func:`~ptq.checkpoint.fresh.verify_in_fresh_process` says what cannot be
            compared for which models).
        say: told in words what was compared.
        card: write a README.md about a transformers model, if the files above have none.

    Raises:
        CheckpointError: nothing in the model is quantized, a tensor cannot be stored, the
            directory cannot be used, the disk is full, or what was written is not what is in
            memory (the tensor, file or layer is named).
    """
    check_how(verify)
    layers = layer_entries(model)
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
            schemes = {name: entry.scheme for name, entry in layers.items()}
            section = describe(schemes, aliases, cache_settings(model))
            write_side_files(model, tmp, section, tokenizer, extra_files or {}, carried or {})
            entries = write_shards(tensors, tmp, shard_bytes, total, elsewhere, hashed=True)
            if card and isinstance(model, PreTrainedModel) and not (tmp / CARD).exists():
                hashes = {key: entry.sha256 for key, entry in entries.items()}
                text = card_of(model, config, identity(layers, hashes))
                (tmp / CARD).write_text(text, encoding="utf-8")
            manifest = seal(
                Manifest(
                    format_version=FORMAT_VERSION,
                    versions=versions(),
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
            say(verify_written(tmp, model, verify))
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {target} ({total / 1e6:,.0f} MB) could not be written: {error}; "
            "what was there is unchanged; free some space, or choose another directory"
        ) from error
    return manifest
