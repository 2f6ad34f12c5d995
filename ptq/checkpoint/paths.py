"""File names that come out of a checkpoint's own files, held to the checkpoint's directory."""

import os
from pathlib import Path
from typing import Any

from ptq.errors import CheckpointError


def is_plain(name: Any) -> bool:
    """Whether it is the name of a file, without any directory."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(c in name for c in "/\\\0")
    )


def inside(root: Path, name: Any, *, nested: bool = False) -> Path:
    """The path of a file of the checkpoint.

    Args:
        name: a plain file name, or with ``nested`` a path with ``/`` below the directory.

    Raises:
        CheckpointError: the name leads, or is a symbolic link, out of the directory.
    """
    parts = name.split("/") if nested and isinstance(name, str) else [name]
    if not all(is_plain(part) for part in parts):
        shown = repr(name) if len(repr(name)) < 200 else f"{repr(name)[:200]}..."
        raise CheckpointError(
            f"{root} names the file {shown}, which is not in its directory; "
            "somebody has changed the checkpoint, do not use it"
        )
    path = root.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise CheckpointError(
            f"{path} is a symbolic link out of the checkpoint's directory; "
            "put the file itself there (cp -L)"
        )
    return path
