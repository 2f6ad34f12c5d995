"""The tensors of weight files against the hashes in their headers, in threads."""

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptq.checkpoint.ahead import Ahead
from ptq.checkpoint.contents import check_hash
from ptq.checkpoint.embedded import METADATA_KEY
from ptq.checkpoint.json_file import json_object
from ptq.checkpoint.shard import HASHES_KEY, Stored
from ptq.errors import CheckpointError


def hash_check(
    files: Mapping[Path, Mapping[str, Stored]], metadata: Mapping[Path, Mapping[str, str]]
) -> Ahead[None]:
    """Compares every tensor with its hash, of the files that have hashes; ``results`` raises
    ``CheckpointError`` for one that is damaged or has no hash.

    A tensor is mapped while it is hashed, not read into memory of its own, and comes from the disk
    once for this and for the load that follows.

    Args:
        files: the tensors of each file.
        metadata: what its header says besides.
    """
    hashes = {path: _hashes(path, metadata[path]) for path in files}

    def check(descriptor: int, path: Path, key: str, stored: Stored) -> None:
        wanted = hashes[path]
        assert wanted is not None
        check_hash(path, key, _sha256(descriptor, stored), wanted.get(key))

    return Ahead(check, {path: files[path] for path in files if hashes[path] is not None})


def _sha256(descriptor: int, stored: Stored) -> str:
    if stored.nbytes == 0:
        return hashlib.sha256().hexdigest()
    skipped = stored.start % mmap.ALLOCATIONGRANULARITY
    with (
        mmap.mmap(
            descriptor,
            skipped + stored.nbytes,
            access=mmap.ACCESS_READ,
            offset=stored.start - skipped,
        ) as mapped,
        memoryview(mapped) as data,
        data[skipped:] as part,
    ):
        return hashlib.sha256(part).hexdigest()


def _hashes(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What ptq.save, or save_pretrained with ptq, wrote into the header; None if neither did."""
    if HASHES_KEY in metadata:
        return json_object(metadata[HASHES_KEY], path)
    if METADATA_KEY not in metadata:
        return None
    entries = json_object(metadata[METADATA_KEY], path).get("tensors")
    if not isinstance(entries, dict):
        raise CheckpointError(f"the manifest in {path} is damaged; copy the file again")
    return {key: entry.get("sha256") for key, entry in entries.items() if isinstance(entry, dict)}
