"""A full check of a checkpoint on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptq.checkpoint.contents import check_file, check_tensor, checked_header
from ptq.checkpoint.manifest import Manifest
from ptq.checkpoint.manifest_read import check_index, read_manifest
from ptq.checkpoint.shard import read_tensors
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
