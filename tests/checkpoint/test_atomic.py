"""Whatever goes wrong and whenever, there is a whole old checkpoint or a whole new one."""

import errno
import os
import resource
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ptq.checkpoint import check_target, load, save, verify_files
from ptq.checkpoint.atomic import Siblings, recover, replacing
from ptq.errors import CheckpointError
from tests.checkpoint.faults import fault
from tests.helpers import quantize_linears

STEPS = 200  # more file operations than any save has


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 8))


def write(target: Path, which: str, *, overwrite: bool = True) -> None:
    """Save in two shards."""
    model = quantize_linears(plain(), "w8a16")
    save(model, target, overwrite=overwrite, shard_bytes=256, extra_files={"which": which})


def which(target: Path) -> str:
    """Which checkpoint is there; it must be whole."""
    assert verify_files(target) == []
    return (target / "which").read_text()


def which_loaded(target: Path) -> str:
    """As ``which``, after a load, which may have to put the checkpoint back first."""
    load(target, model=plain())
    return which(target)


def raiser(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def attempt(
    target: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException
) -> tuple[set[str], bool]:
    """Where the fault struck (functions and the operation), and whether the save failed."""
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    raised = False
    with fault(monkeypatch, target.parent, number, raiser(error)) as one:
        try:
            write(target, "new")
        except expected:
            raised = True
    return set(one.hits), raised


@pytest.mark.parametrize("old", [True, False], ids=["replace", "fresh"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=repr)
def test_an_error_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, old: bool
) -> None:
    seen: set[str] = set()
    for number in range(STEPS):
        parent = tmp_path / str(number)
        parent.mkdir()
        target = parent / "out"
        if old:
            write(target, "old")
        struck, raised = attempt(target, monkeypatch, number, error)
        if not struck:
            break
        seen |= struck
        there = which(target) if target.exists() else None
        # An OSError is survived where only locks, the names' durability or waste are at stake.
        survived = isinstance(error, OSError) and struck & {"_hold", "_sync_directory", "settle"}
        assert raised == (not survived)
        if survived:
            assert there == "new"
        elif not struck & {"_sync_directory", "settle"}:
            assert there == ("old" if old else None)
        assert there in ("old" if old else None, "new")
        if "settle" not in struck:
            assert os.listdir(parent) == (["out"] if there else [])
        write(target, "next")
        assert os.listdir(parent) == ["out"] and which(target) == "next"
    assert number < STEPS - 1 and which(target) == "new" and os.listdir(parent) == ["out"]
    assert {"os.mkdir", "os.rename", "os.fsync", "write_shard", "write_manifest"} <= seen
    assert ("settle" in seen) == old


def killed(
    action: Callable[[], object], monkeypatch: pytest.MonkeyPatch, parent: Path, n: int
) -> bool:
    """Whether a child process was killed (SIGKILL) at the n-th file operation of ``action``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's threads
        child = os.fork()
    if child == 0:
        try:
            with fault(monkeypatch, parent, n, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "the child failed by itself"
    return status != 0


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """A forked process has none of torch's others, and would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("old", [True, False], ids=["replace", "fresh"])
def test_a_kill_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    seen = set()
    for number in range(STEPS):
        parent = tmp_path / str(number)
        parent.mkdir()
        target = parent / "out"
        if old:
            write(target, "old")
        if not killed(lambda t=target: write(t, "new"), monkeypatch, parent, number):
            break
        missing = not target.exists()
        seen.add(missing)
        if old:  # loading puts back what was on its way out
            assert which_loaded(target) in ("old", "new")
        elif not missing:
            assert which(target) == "new"
        write(target, "next")
        assert os.listdir(parent) == ["out"] and which(target) == "next"
    assert number < STEPS - 1 and which(target) == "new"
    assert seen == {True, False}  # old: the kill between the two renames was among them


def test_a_kill_while_a_killed_save_is_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(STEPS):
        parent = tmp_path / str(number)
        parent.mkdir()
        target = parent / "out"
        write(target, "old")
        siblings = Siblings(target, "00")
        write(siblings.tmp, "new")
        target.rename(siblings.old)
        if not killed(lambda t=target: recover(t), monkeypatch, parent, number):
            break
        assert which_loaded(target) == "old"
        recover(target)
        assert os.listdir(parent) == ["out"]
    assert 1 < number < STEPS - 1


def test_the_empty_directory_made_after_a_kill_does_not_hide_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(Siblings(target, "00").old, "old")
    target.mkdir()
    with pytest.raises(CheckpointError, match="holds a ptq checkpoint already"):
        check_target(target, overwrite=False, needed_bytes=0)
    assert which(target) == "old" and os.listdir(tmp_path) == ["out"]


def test_the_old_is_kept_if_something_else_has_taken_its_place(tmp_path: Path) -> None:
    target = tmp_path / "out"
    old = Siblings(target, "00").old
    write(old, "old")
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="did not write"):
        write(target, "new")
    assert which(old) == "old" and (target / "thesis.txt").read_text() == "mine"


def test_the_siblings_of_others_are_left_alone(tmp_path: Path) -> None:
    others = [".out.ptq-tmpx", ".out2.ptq-tmp-00", ".ut.ptq-old-00", "out.ptq-tmp-00", ".out"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.ptq-tmp-00").mkdir()
    write(tmp_path / "out", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "out"])


def test_a_writer_that_lives_keeps_its_siblings(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with replacing(target, overwrite=True) as tmp:
        (tmp / "half").write_text("written")
        write(target, "second")
        assert (tmp / "half").read_text() == "written"
        (tmp / "ptq_manifest.json").write_text("{}")
    assert sorted(os.listdir(target)) == ["half", "ptq_manifest.json"]
    assert os.listdir(tmp_path) == ["out"]


def test_two_writers_at_once(tmp_path: Path) -> None:
    """The last one wins, neither sees the other's files, none is left over."""
    target = tmp_path / "out"
    errors: list[BaseException] = []

    def worker(name: str) -> None:
        try:
            for _ in range(5):
                write(target, name)
        except CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=worker, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write(target, "last")
    assert which(target) == "last" and os.listdir(tmp_path) == ["out"]


def test_what_appears_during_the_writing_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OSError), replacing(target, overwrite=True) as tmp:
        (tmp / "a").write_text("a")
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["thesis.txt"]
    (target / "thesis.txt").rename(target / "ptq_manifest.json")
    with pytest.raises(OSError), replacing(target, overwrite=False) as tmp:
        (tmp / "a").write_text("a")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["ptq_manifest.json"]


def test_a_real_failure_of_write(tmp_path: Path) -> None:
    """The kernel refuses to let files grow, as on a full disk."""
    target = tmp_path / "out"
    write(target, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"out .*could not be written: .*free some space"):
            save(quantize_linears(plain(), "w8a16"), target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert which(target) == "old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_everything_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    rename = os.rename
    path_of = lambda fd: os.readlink(f"/proc/self/fd/{fd}")
    monkeypatch.setattr(os, "fsync", lambda fd: log.append(path_of(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), rename(a, b)))
    write(tmp_path / "out", "new")
    at = log.index("rename")
    synced = {Path(path).name for path in log[:at]}
    assert set(os.listdir(tmp_path / "out")) <= synced
    assert any(name.startswith(".out.ptq-tmp-") for name in synced)
    assert log[at + 1 :] == [str(tmp_path)]


def test_permissions_are_those_of_any_new_directory(tmp_path: Path) -> None:
    write(tmp_path / "out", "new")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").write_text("")
    mode = lambda path: os.stat(path).st_mode & 0o777
    assert mode(tmp_path / "out") == mode(tmp_path / "plain")
    assert mode(tmp_path / "out/ptq_manifest.json") == mode(tmp_path / "plain/file")


def test_a_tokenizer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, directory: str) -> Any:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        save(quantize_linears(plain(), "w8a16"), tmp_path / "out", tokenizer=Broken())
    assert os.listdir(tmp_path) == []
