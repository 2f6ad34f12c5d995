"""The tensors of weight files against the hashes in their headers."""

import hashlib
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ptq.checkpoint.embedded import METADATA_KEY
from ptq.checkpoint.json_file import json_object
from ptq.checkpoint.shard import HASHES_KEY, Stored, read_header, read_metadata
from ptq.errors import CheckpointError

_THREADS = 4  # that hash; more would wait for the disk


def check_hashes(path: Path) -> None:
    """Compare every tensor of a file with its hash, if the file has hashes.

    The file is mapped, not read into memory of its own, and comes from the disk once for this and
    for the load that follows.

    Raises:
        CheckpointError: a tensor is damaged, or has no hash; it is named.
    """
    hashes = _hashes(path)
    if hashes is None:
        return
    header = read_header(path)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
        ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool,
    ):
        for key, found in zip(
            header, pool.map(partial(_sha256, data), header.values()), strict=True
        ):
            if hashes.get(key) != found:
                raise CheckpointError(
                    f"tensor {key} in {path} is damaged: its bytes are not those that were "
                    "written; copy the file again"
                )


def _sha256(data: memoryview, stored: Stored) -> str:
    size = math.prod(stored.shape) * stored.dtype.itemsize
    with data[stored.start : stored.start + size] as part:
        return hashlib.sha256(part).hexdigest()


def _hashes(path: Path) -> dict[str, Any] | None:
    """What ptq.save, or save_pretrained with ptq, wrote into the header; None if neither did."""
    metadata = read_metadata(path)
    if HASHES_KEY in metadata:
        return json_object(metadata[HASHES_KEY], path)
    if METADATA_KEY not in metadata:
        return None
    entries = json_object(metadata[METADATA_KEY], path).get("tensors")
    if not isinstance(entries, dict):
        raise CheckpointError(f"the manifest in {path} is damaged; copy the file again")
    return {key: entry.get("sha256") for key, entry in entries.items() if isinstance(entry, dict)}
