"""Replacing a directory so that a kill at any moment leaves the old one or the new one.

Two siblings of the target share a random token. ``.NAME.ptq-tmp-TOKEN`` is being written, or is
waste; ``.NAME.ptq-old-TOKEN`` is a whole old checkpoint on its way out. The steps of a replacement:

1. write and sync tmp                    killed here: the target is as it was, tmp is waste
2. rename target to old                  killed here: old is whole, and goes back
3. rename tmp to target                  killed here: the target is new, old is waste
4. rename old to tmp, and delete it      killed here: the target is new, tmp is waste

:func:`settle` knows these states from the names alone, so the next save or load puts right what
a killed one left. The writer holds a lock (``flock``) on its siblings, which dies with it; nobody
touches the siblings of a writer that lives.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptq.checkpoint.manifest import MANIFEST


@dataclass(frozen=True)
class Siblings:
    """The two names that one save uses beside its target."""

    target: Path
    token: str

    @property
    def tmp(self) -> Path:
        return self.target.with_name(f"{_prefix(self.target, 'tmp')}{self.token}")

    @property
    def old(self) -> Path:
        return self.target.with_name(f"{_prefix(self.target, 'old')}{self.token}")


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.ptq-{kind}-"


def is_ours(directory: Path) -> bool:
    """Whether ptq wrote this directory."""
    return (directory / MANIFEST).is_file()


def is_free(directory: Path) -> bool:
    """Whether nothing is there, or an empty directory."""
    if not directory.is_dir():
        return not directory.exists()
    return not any(directory.iterdir())


@contextlib.contextmanager
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty directory to fill; when the block ends without error, it becomes the target.

    Whatever goes wrong, the target is then the old one and no sibling is left.

    Args:
        target: absolute; its parent exists.
        overwrite: a checkpoint of ours at the target may be replaced; anything else never is.

    Raises:
        OSError: a file operation failed, or something else has appeared at the target.
    """
    siblings = Siblings(target, secrets.token_hex(4))
    with contextlib.ExitStack() as locks:
        try:
            siblings.tmp.mkdir()
            _hold(siblings.tmp, locks)
            yield siblings.tmp
            _sync(siblings.tmp)
            if overwrite and is_ours(target):
                _hold(target, locks)
                os.rename(target, siblings.old)
            os.rename(siblings.tmp, target)
            _sync_directory(target.parent)
        finally:
            settle(siblings)


def settle(siblings: Siblings) -> None:
    """Bring a replacement that was left at any step to an end, forwards or back.

    Waste that cannot be removed stays, hidden by its name, until the next save tries again.

    Raises:
        OSError: the old checkpoint cannot be put back.
    """
    target, tmp, old = siblings.target, siblings.tmp, siblings.old
    if old.exists():
        if is_ours(target):
            with contextlib.suppress(OSError):
                os.rename(old, tmp)
        elif is_free(target):
            os.rename(old, target)
    shutil.rmtree(tmp, ignore_errors=True)


def recover(target: Path) -> None:
    """Settle what killed saves left beside the target.

    Raises:
        OSError: an old checkpoint cannot be put back.
    """
    if not target.parent.is_dir():
        return
    names = [path.name for path in target.parent.iterdir()]
    for token in {
        name.removeprefix(prefix)
        for prefix in (_prefix(target, "tmp"), _prefix(target, "old"))
        for name in names
        if name.startswith(prefix)
    }:
        siblings = Siblings(target, token)
        with contextlib.ExitStack() as locks:
            if all(_hold(path, locks) for path in (siblings.tmp, siblings.old) if path.exists()):
                settle(siblings)


def _hold(directory: Path, locks: contextlib.ExitStack) -> bool:
    """Lock a directory until ``locks`` closes; False if another writer has it, or it cannot be."""
    import fcntl

    try:
        descriptor = os.open(directory, os.O_RDONLY)
        locks.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync(directory: Path) -> None:
    """Have the disk hold every file below the directory."""
    for path in directory.rglob("*"):
        if path.is_dir():
            _sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(path: Path) -> None:
    """Have the disk hold the names in a directory, if its file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
