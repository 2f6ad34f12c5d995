"""Faults at the n-th file operation below a directory.

Python announces every file operation to audit hooks before it is carried out (PEP 578). A hook
cannot be removed, so there is one, which does nothing unless a fault is armed.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Fault:
    """Calls ``action`` before the operation with this number; counts from zero.

    Args:
        hits: the functions, outermost first, in which the fault struck; empty if it did not.
    """

    number: int
    action: Callable[[], None]
    directory: str
    count: int = 0
    hits: list[str] = field(default_factory=list)


_armed: list[Fault] = []
_installed: list[bool] = []


@contextlib.contextmanager
def fault(
    monkeypatch: pytest.MonkeyPatch, directory: Path, number: int, action: Callable[[], None]
) -> Iterator[Fault]:
    """Arm a fault; it strikes once."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    one = Fault(number, action, str(directory))
    sync = os.fsync
    with monkeypatch.context() as patches:
        patches.setattr(os, "fsync", lambda fd: (_strike("os.fsync"), sync(fd))[1])
        _armed.append(one)
        try:
            yield one
        finally:
            _armed.clear()


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _armed and event in (
        "open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.listdir",
    ):  # fmt: skip
        paths = [os.fspath(a) for a in args if isinstance(a, str | os.PathLike)]
        relative = event in ("os.rmdir", "os.remove")  # rmtree works with directory descriptors
        if relative or any(str(path).startswith(_armed[0].directory) for path in paths):
            _strike(event)


def _strike(event: str) -> None:
    if not _armed:
        return
    one = _armed[0]
    one.count += 1
    if one.count == one.number + 1:
        frame = sys._getframe()
        while frame is not None:
            one.hits.insert(0, frame.f_code.co_name)
            frame = frame.f_back
        one.hits.append(event)
        one.action()
