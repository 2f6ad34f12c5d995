"""The store of a run: finished blocks, hidden states and progress, as files in one directory.

- ``work.json``: the fingerprint;
- ``BLOCK.safetensors``: all tensors of a finished block;
- ``hidden-NNNNNN.safetensors``: hidden states, of one batch or of several;
- ``FIRST_BLOCK.state-NNNNN.json``: how far the list of blocks that starts with this one is, which
  of these files that takes, and their hashes;
- ``saving.json``: all blocks are finished, and the checkpoint is being written.

A file is written under another name, synced, and renamed. The two newest states are kept, so that
one that is damaged has one before it.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from ptq.blockwise import Reached, empty
from ptq.checkpoint.shard import map_tensors, read_header, read_tensors
from ptq.errors import CheckpointError
from ptq.resume.folder import SAVING, Say, lock, prepare, remove, saving_was_cut_off, writing
from ptq.resume.heap import give_back, steady
from ptq.resume.state import State, Stored, read_state, write_state, write_tensors

SHARE = 0.1
"""Of the time, at most, goes into keeping progress; progress beyond that is not kept."""


@dataclass(eq=False)
class Work:
    """A :class:`ptq.blockwise.Store` in a directory, which it has for itself until it ends.

    Args:
        streams: finished blocks leave memory, and hidden states are held in files.
        say: is told what cannot be gone on with, and what is.
        go_on: there may be work of an earlier run.
    """

    root: Path
    streams: bool
    say: Say
    go_on: bool
    descriptor: int
    elsewhere: dict[str, Callable[[], Tensor]] = field(default_factory=dict, init=False)
    _blocks: dict[str, list[Stored]] = field(default_factory=dict, init=False)
    _states: dict[str, list[State]] = field(default_factory=dict, init=False)
    _parked: dict[int, Stored] = field(default_factory=dict, init=False)  # by address
    _number: int = field(default=0, init=False)  # of the next file of hidden states
    _ended: float = field(default=0.0, init=False)
    _cost: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.streams:
            steady()
        names = (path.name for path in self.root.glob("hidden-*"))
        self._number = max((int(name[7:13]) for name in names), default=0)

    @classmethod
    def open(
        cls, root: Path, wanted: Mapping[str, Any], *, resume: bool, streams: bool, say: Say
    ) -> Self:
        """Take the directory; work in it that has another fingerprint is discarded, and said.

        Raises:
            CheckpointError: another run has it, or it is not ptq's.
        """
        with ExitStack() as held:
            descriptor = lock(root)
            held.callback(os.close, descriptor)
            go_on = prepare(root, wanted, resume, say)
            held.pop_all()
        return cls(root, streams, say, go_on, descriptor)

    @property
    def saving_was_cut_off(self) -> bool:
        """Whether the checkpoint that is there may be that of this very work."""
        return self.go_on and saving_was_cut_off(self.root)

    def mark_saving(self) -> None:
        """From now on, a checkpoint that is there comes from this work, and may be replaced."""
        with writing(self.root / SAVING) as path:
            path.write_text("{}\n", encoding="utf-8")

    def remove(self) -> None:
        """The work is done: remove it."""
        remove(self.root)

    def close(self) -> None:
        """Let go of the directory; what is in it stays."""
        os.close(self.descriptor)

    def park(self, hidden: Tensor) -> Tensor:
        """The same hidden states, held in a file; those on a GPU stay where they are."""
        if hidden.device.type != "cpu":
            return hidden
        stored = write_tensors(self._next_hidden(), {"0": hidden})
        return self._mapped(stored)[0]

    def load(self, names: list[str]) -> Reached | None:
        """What the newest state that is whole says of these blocks."""
        paths = sorted(self.root.glob(f"{names[0]}.state-*.json"), reverse=True)
        for path in paths if self.go_on else ():
            try:
                state = read_state(path)
            except CheckpointError as error:
                self.say(f"{path} is not used: {error}; going back to the one before")
                continue
            self._blocks[names[0]], self._states[names[0]] = list(state.blocks), [state]
            for position, name in enumerate(names[: len(state.blocks)]):
                self._note_elsewhere(name, state.blocks[position])
            self.say(
                f"going on after {names[len(state.blocks) - 1]}, {len(state.blocks)} of "
                f"{len(names)} blocks, with the work of an earlier run in {self.root}"
            )
            hidden, exact = self._hidden(state.hidden), self._hidden(state.exact)
            finished, rotated = len(state.blocks), state.rotated
            return Reached(finished, hidden, exact, state.notes, state.remedies, rotated)
        return None

    def read_block(self, names: list[str], position: int) -> dict[str, Tensor]:
        """The tensors of a finished block: mapped where this streams, else in memory."""
        path = self.root / self._blocks[names[0]][position].file
        return map_tensors(path) if self.streams else dict(read_tensors(path, read_header(path)))

    def keep_block(self, names: list[str], position: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a block."""
        blocks = self._blocks.setdefault(names[0], [])
        blocks[position:] = [self._write(names[position], tensors)]

    def keep_progress(self, names: list[str], reached: Reached) -> None:
        """Write the state, unless writing would take more than :data:`SHARE` of the time."""
        held = [*reached.hidden, *reached.exact]
        start = time.monotonic()
        if held and not self.streams and start - self._ended < self._cost / SHARE:
            return
        state = State(
            names=names,
            blocks=self._blocks[names[0]],
            hidden=self._kept(reached.hidden),
            exact=self._kept(reached.exact),
            notes=reached.notes,
            remedies=reached.remedies,
            rotated=reached.rotated,
        )
        write_state(self.root / f"{names[0]}.state-{reached.finished:05}.json", state)
        self._states[names[0]] = [*self._states.get(names[0], []), state][-2:]
        self._tidy(names[0])
        if self.streams:
            give_back()
        self._ended = time.monotonic()
        self._cost = self._ended - start

    def put_out(self, model: nn.Module, name: str) -> None:
        """Write a module of the model, and let go of its values."""
        module = model.get_submodule(name)
        self._write(name, module.state_dict())
        empty(module)
        give_back()

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> Stored:
        stored = write_tensors(self.root / f"{name}.safetensors", tensors)
        self._note_elsewhere(name, stored, tensors)
        return stored

    def _note_elsewhere(self, name: str, stored: Stored, keys: Iterable[str] | None = None) -> None:
        """Where the values of a module that left memory are."""
        path = self.root / stored.file
        if self.streams:
            for key in read_header(path) if keys is None else keys:
                self.elsewhere[f"{name}.{key}"] = partial(_read_one, path, key)

    def _next_hidden(self) -> Path:
        self._number += 1
        return self.root / f"hidden-{self._number:06}.safetensors"

    def _mapped(self, stored: Stored) -> list[Tensor]:
        """Hidden states in a file, in the order of their batches."""
        tensors = map_tensors(self.root / stored.file)
        hidden = [tensors[str(i)] for i in range(len(tensors))]
        if self.streams and len(hidden) == 1:
            self._parked[hidden[0].data_ptr()] = stored
        return hidden

    def _hidden(self, files: list[Stored]) -> list[Tensor]:
        """Hidden states as this run holds them: mapped, or in memory."""
        mapped = [tensor for stored in files for tensor in self._mapped(stored)]
        return mapped if self.streams else [tensor.clone() for tensor in mapped]

    def _kept(self, hidden: list[Tensor]) -> list[Stored]:
        """The files of hidden states; written now, unless they are in files."""
        parked = [self._parked.get(tensor.data_ptr()) for tensor in hidden]
        known = [stored for stored in parked if stored is not None]
        if len(known) == len(hidden):
            return known
        return [write_tensors(self._next_hidden(), {str(i): t for i, t in enumerate(hidden)})]

    def _tidy(self, first: str) -> None:
        """Remove what the last two states of each list do not need."""
        states = [state for pair in self._states.values() for state in pair]
        needed = {file for state in states for file in state.files}
        for path in self.root.glob("hidden-*"):
            if path.name not in needed:
                path.unlink()
        self._parked = {at: s for at, s in self._parked.items() if s.file in needed}
        for path in sorted(self.root.glob(f"{first}.state-*.json"))[:-2]:
            path.unlink()


def _read_one(path: Path, key: str) -> Tensor:
    return map_tensors(path)[key]
