"""What is said before hours of work about a directory that cannot be written."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from torch import nn

from ptq.checkpoint import check_target, save
from ptq.checkpoint.card import is_own_card
from ptq.errors import CheckpointError
from tests.helpers import quantize_linears, tiny_llama


def refuses(directory: Path, pattern: str, *, overwrite: bool = True, needed: int = 0) -> None:
    with pytest.raises(CheckpointError, match=pattern) as caught:
        check_target(directory, overwrite, needed)
    assert "\n" not in str(caught.value)


def test_nothing_there_or_an_empty_directory(tmp_path: Path) -> None:
    assert check_target(tmp_path / "out", False, 1) == tmp_path / "out"
    (tmp_path / "out").mkdir()
    assert check_target(tmp_path / "out", False, 1) == tmp_path / "out"
    save(quantize_linears(nn.Sequential(nn.Linear(8, 8)), "w8a16"), tmp_path / "out")
    assert len(os.listdir(tmp_path / "out")) == 2


def test_a_checkpoint_of_ours_needs_overwrite(tmp_path: Path) -> None:
    model = quantize_linears(nn.Sequential(nn.Linear(8, 8)), "w8a16")
    save(model, tmp_path / "out")
    refuses(tmp_path / "out", "holds a ptq checkpoint already; .*overwrite", overwrite=False)
    with pytest.raises(CheckpointError, match="already"):
        save(model, tmp_path / "out")
    assert check_target(tmp_path / "out", True, 1) == tmp_path / "out"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_foreign_directory_or_file_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "x")
    refuses(tmp_path / "thesis", "directory that ptq did not write", overwrite=overwrite)
    refuses(tmp_path / "file", "is a file, it stays", overwrite=overwrite)
    refuses(tmp_path / "dangling", "cannot be made: .*file is a file", overwrite=overwrite)
    model = quantize_linears(nn.Sequential(nn.Linear(8, 8)), "w8a16")
    for name in ("thesis", "file"):
        with pytest.raises(CheckpointError):
            save(model, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "thesis/config.json").read_text() == "{}"
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file", "thesis"]


def test_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "no" / "such" / "out"
    assert check_target(deep, False, 1) == deep
    assert not os.listdir(tmp_path), "a check makes nothing"
    save(quantize_linears(nn.Sequential(nn.Linear(8, 8)), "w8a16"), deep)
    assert load_file(deep / "model.safetensors")
    (tmp_path / "file").write_text("mine")
    refuses(tmp_path / "file" / "out", f"cannot be made: {tmp_path / 'file'} is a file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refuses(tmp_path / "out", f"{tmp_path} is not writable")


@pytest.mark.parametrize("foreign", ["README.md", ".git/HEAD", "other.safetensors"])
def test_files_beside_a_checkpoint_are_not_removed(tmp_path: Path, foreign: str) -> None:
    model = quantize_linears(nn.Sequential(nn.Linear(8, 8)), "w8a16")
    save(model, tmp_path / "out", extra_files={"notes.txt": "ours"})
    (tmp_path / "out/report.json").write_text("{}")
    assert check_target(tmp_path / "out", True, 1)
    path = tmp_path / "out" / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    refuses(tmp_path / "out", f"holds {foreign}, which ptq did not write and would remove")
    with pytest.raises(CheckpointError):
        save(model, tmp_path / "out", overwrite=True)
    assert path.read_text() == "mine"


def test_a_card_that_was_edited_is_not_removed(tmp_path: Path) -> None:
    model = quantize_linears(tiny_llama(), "w8a8")
    save(model, tmp_path / "out")
    save(model, tmp_path / "out", overwrite=True)
    card = tmp_path / "out/README.md"
    card.write_text(card.read_text().replace("quantized with ptq", "quantized with love"))
    refuses(tmp_path / "out", "holds README.md, which ptq did not write and would remove")
    save(model, tmp_path / "mine", extra_files={"README.md": "mine"})
    assert (tmp_path / "mine/README.md").read_text() == "mine"
    save(model, tmp_path / "mine", overwrite=True)  # as it was given
    assert is_own_card(tmp_path / "mine/README.md")


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    refuses(Path("/"), "is a directory that ptq did not write")
    refuses(tmp_path / ("x" * 300), "cannot be a directory: .*too long")
    refuses(Path(f"{tmp_path}/a\0b"), "cannot be a directory: .*null")


def test_a_mount_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    refuses(tmp_path / "out", "mount point")


def test_a_disk_that_is_too_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = SimpleNamespace(f_bavail=100, f_bfree=200, f_frsize=10_000, f_bsize=1, f_blocks=300)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert check_target(tmp_path / "out", False, 1_000_000)
    refuses(tmp_path / "out", "needs 2 MB, its disk has 1 MB left", needed=2_000_000)
    model = quantize_linears(nn.Sequential(nn.Linear(1024, 2048)), "w8a16")
    with pytest.raises(CheckpointError, match="2 MB, its disk has 1 MB left"):
        save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    disk.f_blocks = disk.f_bavail = 0  # a disk that does not know
    assert check_target(tmp_path / "out", False, 2_000_000)


def test_a_symbolic_link_to_the_target_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    model = quantize_linears(nn.Sequential(nn.Linear(8, 8)), "w8a16")
    for _ in range(2):
        save(model, tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["out"]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_target("out", False, 0) == tmp_path / "out"
