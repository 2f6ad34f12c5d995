"""The directory with the work of a run: whose it is, and files that are whole or not there."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ptq.checkpoint.atomic import Siblings
from ptq.errors import CheckpointError
from ptq.resume.fingerprint import changes

FINGERPRINT = "work.json"
SAVING = "saving.json"  # says that the checkpoint is being written, or was

Say = Callable[[str], None]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a name to write to; at the end, its file becomes ``path``, whole.

    Raises:
        CheckpointError: a file operation failed.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if path.suffix == ".json":  # what it names is in the same directory, and on disk with it
            _sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"the work directory {path.parent} cannot be written: {error}; free some space, or "
            "set output.resume: false, which needs none unless the model is streamed"
        ) from None


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_work(root: Path) -> bool:
    """Whether this is a work directory of ptq's."""
    return (root / FINGERPRINT).is_file()


def saving_was_cut_off(root: Path) -> bool:
    """Whether a run was ended while it wrote the checkpoint, or after it and before its report."""
    return is_work(root) and (root / SAVING).is_file()


def work_root(output: str) -> Path:
    """The work directory beside an output directory."""
    return Path(f"{os.path.realpath(output)}.work")


def remove(root: Path) -> None:
    """Remove a work directory, at one blow: what a kill leaves is waste to the next save there."""
    waste = Siblings(root.with_name(root.name.removesuffix(".work")), secrets.token_hex(4)).tmp
    os.rename(root, waste)
    shutil.rmtree(waste, ignore_errors=True)


def discard(root: Path) -> bool:
    """Remove a work directory of an earlier run, if there is one; returns whether there was.

    What ptq did not make stays.

    Raises:
        CheckpointError: another run has it.
    """
    found = is_work(root)
    if found:
        descriptor = lock(root)
        remove(root)
        os.close(descriptor)
    return found


def prepare(root: Path, wanted: Mapping[str, Any], resume: bool, say: Say) -> bool:
    """Make the directory, empty unless it holds work with this very fingerprint.

    Args:
        resume: false: empty it anyway.
        say: is told why what was there is not gone on with.

    Returns:
        Whether there may be work to go on with.

    Raises:
        CheckpointError: something that is no work directory is there, or it cannot be written.
    """
    wanted = json.loads(json.dumps(wanted))
    if is_work(root):
        reason = _reason(root, wanted) if resume else "output.resume is false"
        if reason is None:
            return True
        say(f"the work of an earlier run in {root} is discarded: {reason}")
        for path in sorted(root.iterdir(), key=lambda p: p.name == FINGERPRINT):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif any(path.name != f"{FINGERPRINT}.tmp" for path in root.iterdir()):
        raise CheckpointError(
            f"{root} is where the work of this run would go, and ptq did not make it; move it "
            "away, or choose another output.dir"
        )
    with writing(root / FINGERPRINT) as path:
        path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    return False


def _reason(root: Path, wanted: Mapping[str, Any]) -> str | None:
    """Why the work there is of no use; None if it is."""
    try:
        found = json.loads((root / FINGERPRINT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {FINGERPRINT} cannot be read ({error})"
    if not isinstance(found, dict):
        return f"its {FINGERPRINT} is not one"
    differ = changes(found, wanted)
    return f"other {', '.join(differ)}" if differ else None


def lock(root: Path) -> int:
    """Take a directory for this process alone, until the descriptor is closed or it ends.

    Raises:
        CheckpointError: another run has it.
    """
    import fcntl

    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"the work directory {root} cannot be made: {error}; choose another output.dir"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise CheckpointError(
            f"another run works in {root}; wait for it, or choose another output.dir"
        ) from None
    return descriptor
