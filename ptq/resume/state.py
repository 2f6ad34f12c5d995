"""How far a list of blocks is, as a file says it: names of files with tensors, and their hashes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ptq.checkpoint.hashing import tensor_sha256
from ptq.checkpoint.shard import dtype_name, map_tensors, write_shard
from ptq.errors import CheckpointError
from ptq.resume.folder import writing


class Stored(BaseModel):
    """A safetensors file in the directory of the state, and the hash of what is in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: str
    sha256: str


class State(BaseModel):
    """The first blocks of a list, finished, and what enters the next one.

    Args:
        hidden, exact: the files whose tensors, one after the other, are those of the batches.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    names: list[str]
    blocks: list[Stored]
    hidden: list[Stored]
    exact: list[Stored]
    notes: list[str]
    remedies: list[str]
    rotated: list[list[str]]

    @property
    def files(self) -> set[str]:
        """All files that it needs."""
        return {stored.file for stored in (*self.blocks, *self.hidden, *self.exact)}


def write_state(path: Path, state: State) -> None:
    """Write the file, with a hash over the rest."""
    body = state.model_dump(mode="json")
    with writing(path) as temporary:
        text = json.dumps({"sha256": _sha256(body), "state": body})
        temporary.write_text(text, encoding="utf-8")


def read_state(path: Path) -> State:
    """Read the file, and compare everything that it names with its hash.

    Raises:
        CheckpointError: the state, or a file that it needs, is not what was written.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        whole = found["sha256"] == _sha256(found["state"])
        state = State.model_validate(found["state"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error!r}") from None
    if state is None:
        raise CheckpointError(f"{path.name} does not have the hash that it gives")
    for stored in (*state.blocks, *state.hidden, *state.exact):
        tensors = map_tensors(path.parent / stored.file)
        hashes = {key: tensor_sha256(tensor) for key, tensor in tensors.items()}
        if _digest(tensors, hashes) != stored.sha256:
            raise CheckpointError(f"{stored.file} is not what was written")
    return state


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Stored:
    """Write a safetensors file, whole or not at all."""
    with writing(path) as temporary:
        hashes = write_shard(temporary, tensors)
    return Stored(file=path.name, sha256=_digest(tensors, hashes))


def _digest(tensors: Mapping[str, Tensor], hashes: Mapping[str, str]) -> str:
    """Over names, dtypes, shapes and values."""
    kinds = {key: [dtype_name(t.dtype), list(t.shape)] for key, t in tensors.items()}
    return _sha256([[key, kinds[key], hashes[key]] for key in sorted(tensors)])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
