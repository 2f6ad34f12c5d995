"""Work on the tensors of files in threads, while the caller builds the model that they are for.

Reading and hashing run without Python's lock. To get it back, a thread waits up to 5 ms where
another computes, so small tensors are left for when the caller waits. Only so much is begun before
:meth:`Ahead.begin_rest` as is soon done: the caller may yet find that the files are not to be read.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Generic, TypeVar
from weakref import finalize

from ptq.checkpoint.shard import Stored
from ptq.errors import CheckpointError

T = TypeVar("T")
_THREADS = 4  # more would wait for the disk
_LARGE = 4_000_000  # bytes of a tensor that is begun early
_EARLY = 500_000_000  # bytes that are begun early, together


class Ahead(AbstractContextManager["Ahead[T]"], Generic[T]):
    """What ``work`` makes of each tensor. Leaving the context drops what is not begun.

    Args:
        work: given an open file, its path, and the name and place of a tensor.
        files: the tensors of each file.

    Raises:
        CheckpointError: a file cannot be opened.
    """

    def __init__(
        self,
        work: Callable[[int, Path, str, Stored], T],
        files: Mapping[Path, Mapping[str, Stored]],
    ):
        self._work = work
        self._made: dict[tuple[Path, str], Future[T]] = {}
        self._stack = ExitStack()
        self._close = finalize(self, self._stack.close)  # also where nobody leaves the context
        self._open = {path: self._opened(path) for path in files}
        self._places = [(p, key, s) for p, header in files.items() for key, s in header.items()]
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
        self._stack.callback(self._pool.shutdown, cancel_futures=True)
        left = _EARLY
        for path, key, stored in self._places:
            if _LARGE <= stored.nbytes <= left:
                left -= stored.nbytes
                self._begin(path, key, stored)

    def begin_rest(self) -> None:
        """Begin with all that has not been begun."""
        for path, key, stored in self._places:
            if (path, key) not in self._made:
                self._begin(path, key, stored)

    def results(self) -> dict[str, T]:
        """What was made of each tensor, in the order of the files; waits for it.

        Raises:
            CheckpointError: whatever ``work`` raised for the first tensor that it failed with.
        """
        self.begin_rest()
        return {key: self._made[path, key].result() for path, key, _ in self._places}

    def __exit__(self, *_: object) -> None:
        self._close()

    def _begin(self, path: Path, key: str, stored: Stored) -> None:
        self._made[path, key] = self._pool.submit(self._work, self._open[path], path, key, stored)

    def _opened(self, path: Path) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            self._close()
            raise CheckpointError(f"shard {path} cannot be read: {error}") from None
        self._stack.callback(os.close, descriptor)
        return descriptor
