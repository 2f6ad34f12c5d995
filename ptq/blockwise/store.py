"""What keeps finished blocks, so that a run that was killed can go on, and memory holds one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reached:
    """How far a list of blocks is.

    Args:
        finished: the first so many blocks are.
        hidden: per batch, what enters the next block; empty where nothing more needs it.
        exact: the same of the float model, where it is followed.
        notes, remedies: all of the run so far.
        rotated: names of the layers so far whose input is rotated, those together that share a
            rotation: what a finish learns depends on it, in the last bit.
    """

    finished: int
    hidden: list[Tensor]
    exact: list[Tensor]
    notes: list[str]
    remedies: list[str]
    rotated: list[list[str]]


class Store(Protocol):
    """Keeps blocks and progress outside the process.

    ``streams``: finished blocks leave memory, and hidden states are held in files.
    """

    streams: bool

    def park(self, hidden: Tensor) -> Tensor:
        """The same hidden states, held in a file."""

    def load(self, names: list[str]) -> Reached | None:
        """What an earlier run finished of these blocks, if it did."""

    def read_block(self, names: list[str], position: int) -> dict[str, Tensor]:
        """The tensors of a finished block."""

    def keep_block(self, names: list[str], position: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a block that is finished now."""

    def keep_progress(self, names: list[str], reached: Reached) -> None:
        """Keep how far these blocks are; it may be left out where it was done just before."""
