"""A full check of a checkpoint on disk."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ptq.checkpoint.contents import check_file, check_tensor, checked_header
from ptq.checkpoint.embedded import METADATA_KEY
from ptq.checkpoint.json_file import json_object
from ptq.checkpoint.manifest import MANIFEST, Manifest
from ptq.checkpoint.manifest_read import check_index, read_manifest
from ptq.checkpoint.paths import inside
from ptq.checkpoint.shard import (
    HASHES_KEY,
    hashes_text,
    read_metadata,
    read_tensors,
    strange_header,
)
from ptq.errors import CheckpointError


def verify_files(directory: str | Path) -> list[str]:
    """Everything that is wrong with the files of a checkpoint; empty if nothing is.

    Every tensor and every file is read and compared with its hash, one tensor in memory at a
    time. A shard whose header is wrong is one problem; its tensors are then not read.
    """
    root = Path(directory).expanduser()
    try:
        manifest = read_manifest(root)
    except CheckpointError as error:
        return [str(error)]
    problems = _problems(check_index, root, manifest)
    for name in manifest.files:
        problems += _problems(check_file, root, name, manifest)
    for shard in manifest.shards:
        problems += _shard_problems(root, shard, manifest)
    return problems


def verify_bytes(directory: str | Path) -> list[str]:
    """Every problem of :func:`verify_files`, and every byte that no hash covers and that is not as
    it was written: the spelling of the manifest and of the shards' headers."""
    root = Path(directory).expanduser()
    problems = verify_files(root)
    if problems:
        return problems
    manifest = read_manifest(root)
    texts = {shard: read_metadata(inside(root, shard)) for shard in manifest.shards}
    problems += _problems(_check_manifest_text, root, texts)
    for shard, metadata in texts.items():
        hashes = {key: entry.sha256 for key, entry in manifest.in_shard(shard).items()}
        problems += _problems(_check_header_text, inside(root, shard), metadata, hashes)
    return problems


def not_covered(directory: str | Path) -> list[str]:
    """The files of a checkpoint that :func:`verify_bytes` cannot check, as nothing says what was
    written: what was put there afterwards, and all but the weights where transformers wrote it."""
    root = Path(directory).expanduser()
    manifest = read_manifest(root)
    covered = set(manifest.shards)
    if METADATA_KEY not in read_metadata(inside(root, manifest.shards[0])):
        covered |= {MANIFEST, *manifest.files}
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return sorted(set(names) - covered)


def _check_manifest_text(root: Path, texts: Mapping[str, Mapping[str, str]]) -> None:
    """Whether the manifest, or each copy of it in the shards, has the spelling of its writer."""
    copies = {metadata[METADATA_KEY] for metadata in texts.values() if METADATA_KEY in metadata}
    if len(copies) > 1:
        raise CheckpointError(
            f"the shards of {root} do not hold the same manifest; copy them again"
        )
    path = root / (MANIFEST if not copies else next(iter(texts)))
    if copies:
        found = copies.pop()
        wanted = json.dumps(json_object(found, path))
    else:
        found = inside(root, MANIFEST).read_bytes().decode()  # with its own line ends
        wanted = json.dumps(json_object(found, path), indent=1) + "\n"
    if found != wanted:
        raise CheckpointError(
            f"the manifest in {path} is not spelled as it was written, though it says the same; "
            "copy it again"
        )


def _check_header_text(path: Path, metadata: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    strange = strange_header(path)
    if strange is None and not metadata.keys() <= {"format", METADATA_KEY, HASHES_KEY}:
        strange = "has metadata that ptq did not write"
    if strange is None and metadata.get(HASHES_KEY, hashes_text(hashes)) != hashes_text(hashes):
        strange = "has other hashes than the manifest"
    if strange is not None:
        raise CheckpointError(f"the header of {path} {strange}; copy the file again")


def _shard_problems(root: Path, shard: str, manifest: Manifest) -> list[str]:
    problems = []
    try:
        header = checked_header(root, shard, manifest)
        for key, tensor in read_tensors(root / shard, header):
            problems += _problems(check_tensor, root, key, tensor, manifest)
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def _problems(check: Callable[..., None], *args: Any) -> list[str]:
    try:
        check(*args)
    except CheckpointError as error:
        return [str(error)]
    return []
