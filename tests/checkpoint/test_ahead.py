"""Tensors that are read in threads while something else is done."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ptq.checkpoint import ahead
from ptq.checkpoint.ahead import Ahead
from ptq.checkpoint.shard import Stored, read_header, read_tensor, write_shard
from ptq.errors import CheckpointError


def shard(path: Path) -> dict[str, Tensor]:
    tensors = {f"t{n}": torch.arange(n * 100, (n + 1) * 100) for n in range(8)}
    tensors["none"] = torch.empty(0)
    write_shard(path, tensors)
    return tensors


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("large", [0, 4_000_000])
def test_every_tensor_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(ahead, "_LARGE", large)
    wanted = shard(tmp_path / "a")
    files = {tmp_path / "a": read_header(tmp_path / "a")}
    with Ahead(read_tensor, files) as reading:
        found = reading.results()
    assert list(found) == list(files[tmp_path / "a"])
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_little_is_begun_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hostile files may be larger than memory, and not fit the model."""
    shard(tmp_path / "a")
    begun: list[str] = []

    def work(_descriptor: int, _path: Path, key: str, _stored: Stored) -> None:
        begun.append(key)

    monkeypatch.setattr(ahead, "_LARGE", 1)
    monkeypatch.setattr(ahead, "_EARLY", 2000)
    files = {tmp_path / "a": read_header(tmp_path / "a")}
    with Ahead(work, files) as working:
        pass
    assert len(begun) <= 2
    with Ahead(work, files) as working:
        begun.clear()
        working.begin_rest()
        working.results()
    assert len(begun) >= 7


def test_the_first_error_and_no_open_files(tmp_path: Path) -> None:
    shard(tmp_path / "a")
    files = {tmp_path / "a": read_header(tmp_path / "a")}
    before = open_files()
    os.truncate(tmp_path / "a", os.path.getsize(tmp_path / "a") - 2000)
    with (
        pytest.raises(CheckpointError, match="cut off within tensor t5"),
        Ahead(read_tensor, files) as reading,
    ):
        reading.results()
    left = Ahead(read_tensor, files)
    assert open_files() == before + 1
    del left
    gc.collect()
    assert open_files() == before
    with pytest.raises(CheckpointError, match="cannot be read"):
        Ahead(read_tensor, {tmp_path / "a": {}, tmp_path / "missing": {}})
    gc.collect()
    assert open_files() == before
