"""Whether a checkpoint can be written to a directory, asked before hours of work."""

import os
from pathlib import Path

from ptq.checkpoint.atomic import is_free, is_ours, recover
from ptq.checkpoint.card import CARD, is_own_card
from ptq.checkpoint.hashing import file_entry
from ptq.checkpoint.manifest import INDEX, MANIFEST, Manifest
from ptq.checkpoint.manifest_read import read_manifest
from ptq.errors import CheckpointError

REPORT = "report.json"
PAGE = "report.html"
"""What a run adds to a checkpoint afterwards, and what is drawn from that."""
BESIDE = ("diagnosis.json", "search.json")
"""What a diagnosis and a search may add."""


def check_target(directory: str | Path, overwrite: bool, needed_bytes: int) -> Path:
    """Check that a checkpoint can be written. What a killed save left there is put right first.

    Args:
        overwrite: whether an existing ptq checkpoint may be replaced. It is removed only after
            the new one is complete, so the disk must have room for both.
        needed_bytes: of the new checkpoint.

    Returns:
        The directory, absolute and without symbolic links.

    Raises:
        CheckpointError: something that is not a ptq checkpoint is there, or one without
            ``overwrite``; it cannot be made where it is to be; the disk is too full.
    """
    target = _resolve(directory)
    _check_parent(target)
    if is_ours(target):
        if not overwrite:
            raise CheckpointError(
                f"{target} holds a ptq checkpoint already; ask to overwrite it "
                "(output.overwrite: true, or --overwrite), or choose another directory"
            )
        _check_only_ours(target)
    elif not is_free(target):
        kind = "directory that ptq did not write" if target.is_dir() else "file"
        raise CheckpointError(f"{target} is a {kind}, it stays as it is; choose another directory")
    if os.path.ismount(target):
        raise CheckpointError(f"{target} is a mount point; choose a directory below it")
    disk = os.statvfs(_existing(target))
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed_bytes:  # some network disks do not know their size
        raise CheckpointError(
            f"{target} needs {needed_bytes / 1e6:,.0f} MB, its disk has {free / 1e6:,.0f} MB left; "
            "free some space, or choose another directory"
        )
    return target


def _resolve(directory: str | Path) -> Path:
    try:
        target = Path(os.path.realpath(Path(directory).expanduser()))
        target.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no such home
        raise CheckpointError(
            f"{str(directory)[:80]!r} cannot be a directory: {error}; choose another"
        ) from None
    return target


def _check_only_ours(target: Path) -> None:
    """Overwriting removes the directory: nothing may be in it that ptq did not write."""
    manifest = read_manifest(target)
    known = {*manifest.files, *(entry.shard for entry in manifest.tensors.values())}
    known |= {MANIFEST, INDEX, REPORT, PAGE, CARD, *BESIDE}
    try:
        paths = sorted(target.rglob("*"))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be listed: {error}; choose another") from None
    for path in paths:
        name = path.relative_to(target).as_posix()
        if name == CARD and not _is_ours(path, manifest):
            known.discard(name)
        if not path.is_dir() and name not in known:
            raise CheckpointError(
                f"{target} holds {name}, which ptq did not write and would remove; "
                "move it away, or choose another directory"
            )


def _is_ours(card: Path, manifest: Manifest) -> bool:
    """Whether a card is as it was written, with the checkpoint or by a run that measured it."""
    written = manifest.files.get(CARD)
    return is_own_card(card) or (written is not None and file_entry(card) == written)


def _existing(target: Path) -> Path:
    """The nearest directory above the target that is there; those below it are made when saving."""
    return next(parent for parent in (*target.parents, target) if parent.exists())


def _check_parent(target: Path) -> None:
    parent = _existing(target)
    if not parent.is_dir():
        raise CheckpointError(
            f"{target} cannot be made: {parent} is a file; choose another directory"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{parent} is not writable; choose another directory")
    try:
        recover(target)
    except OSError as error:
        raise CheckpointError(
            f"a killed save left the checkpoint {target} under another name, and it cannot be "
            f"put back: {error}; rename it by hand"
        ) from None
