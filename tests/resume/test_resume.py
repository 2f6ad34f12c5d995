"""A run that is ended at any point goes on where it was, and gives the same bits."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from ptq.errors import CheckpointError
from ptq.model import StreamedModel
from ptq.report import Report
from ptq.resume import folder as files
from ptq.resume import work
from tests.resume.jobs import BLOCKS, KINDS, TURNED, done, job, make_model, result


class Killed(BaseException):
    """In place of SIGKILL: nothing in ptq catches it."""


def die_at(patch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives what makes the write of some number, counted from 1, the moment of death."""
    replace, left = os.replace, [0]

    def counted(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(source, target)

    patch.setattr(files.os, "replace", counted)
    return lambda number: left.__setitem__(0, number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    make_model(made)
    return made


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """The result of the job when nothing happens to it."""
    done(job(folder, "whole"))
    return result(folder, "whole")


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    """The work of a job that was killed when its last block was finished but not written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "SHARE", 1e9)
        die_at(patch)(4 * (BLOCKS - 1) + 2)
        with pytest.raises(Killed):
            done(job(folder, "half"))
    assert max(p.name for p in (folder / "half.work").glob("*.state*")).endswith("00002.json")
    return folder / "half.work"


@pytest.fixture
def half_done(half: Path, folder: Path) -> Path:
    """The same as the work of the output ``out``."""
    return Path(shutil.copytree(half, folder / "out.work"))


@pytest.fixture(autouse=True)
def _keep_all_progress(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """However little time there is between two blocks; and no test sees another one's output."""
    monkeypatch.setattr(work, "SHARE", 1e9)
    yield
    for path in folder.glob("out*"):
        shutil.rmtree(path)


def ended(config: Any, at: int, kill: Callable[[int], None]) -> Report | None:
    """The report of a run that is killed at a write; None if it came so far."""
    kill(at)
    try:
        return done(config)
    except Killed:
        return None
    finally:
        kill(0)


def layers(folder: Path, output: str) -> dict[str, Any]:
    """What the manifest says of the quantized layers."""
    manifest = json.loads((folder / output / "ptq_manifest.json").read_text())
    found: dict[str, Any] = manifest["layers"]
    return found


def notes(report: Report) -> str:
    return "\n".join(report.sections["notes"])


@pytest.mark.parametrize(
    "kind",
    [
        "loaded",
        "streamed",
        "distilled",
        "rotated, streamed",
        "rotated, distilled",
        "merged",
        "merged, streamed",
    ],
)
def test_killed_at_many_writes_it_gives_the_same_bits(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill, more = die_at(monkeypatch), KINDS[kind]
    whole = done(job(folder, "out-whole", **more))
    config, tries, report = job(folder, "out", **more), 0, None
    while report is None:
        tries += 1
        report = ended(config, (3 if more.get("stream") else 1) * tries, kill)
        assert (folder / "out.work").is_dir() is (report is None)
    assert tries > 4 and "going on after model.layers." in notes(report)
    assert result(folder, "out") == result(folder, "out-whole")
    assert layers(folder, "out") == layers(folder, "out-whole")
    rotated = [
        entry for entry in layers(folder, "out").values() if entry["scheme"]["input_rotation"]
    ]
    assert bool(rotated) == (TURNED in more.get("recipe", ()))
    for key in ("notes", "remedies"):
        assert report.sections["recipe"][key] == whole.sections["recipe"][key]
    # Errors of weights are known where the float weight was: not of blocks that came from files.
    errors = {row["name"]: row for row in whole.sections["weights"]["layers"]}
    last = {row["name"]: row for row in report.sections["weights"]["layers"]}
    assert set(errors) == set(layers(folder, "out")) > set(last)
    assert all(errors[name] == row for name, row in last.items())
    count = len(errors) - len(last)
    assert f"{count} layers were finished by an earlier run: the report has no" in notes(report)


@pytest.mark.parametrize("kind", ["streamed", "distilled"])
def test_blocks_of_experts_are_put_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path, MixtralConfig, num_local_experts=3)
    kill, more = die_at(monkeypatch), KINDS[kind]
    done(job(tmp_path, "out-whole", **more))
    config = job(tmp_path, "out", **more)
    assert ended(config, 18 if kind == "streamed" else 10, kill) is None
    assert "going on after model.layers." in notes(done(config))
    assert result(tmp_path, "out") == result(tmp_path, "out-whole")


@pytest.mark.parametrize("kind", ["distilled", "rotated, distilled"])
def test_a_finish_learns_the_same_on_blocks_that_were_all_there(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: work.Work) -> None:
        raise Killed

    done(job(folder, "out-whole", **KINDS[kind]))
    with monkeypatch.context() as patch:
        patch.setattr(work.Work, "mark_saving", killed)
        with pytest.raises(Killed):
            done(job(folder, "out", **KINDS[kind]))
    report = done(job(folder, "out", **KINDS[kind]))
    assert f"{BLOCKS} of {BLOCKS} blocks" in notes(report)
    assert result(folder, "out") == result(folder, "out-whole")


@pytest.mark.parametrize("kind", ["loaded", "streamed", "rotated, distilled"])
def test_killed_by_a_signal_ten_times_it_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    make_model(tmp_path)
    command = [sys.executable, "-m", "tests.resume.jobs", str(tmp_path), kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env=environment, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("killed after") == 10
    made = [path.name for path in tmp_path.glob("killed-*")]
    assert made and all(result(tmp_path, name) == result(tmp_path, "whole") for name in made)


def test_what_is_finished_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(job(folder, "out", stream=True), 24, die_at(monkeypatch)) is None
    filled: list[str] = []
    fill = StreamedModel.fill
    monkeypatch.setattr(StreamedModel, "fill", lambda s, b: (filled.append(b), fill(s, b)))
    report = done(job(folder, "out", stream=True))
    assert filled == [f"model.layers.{BLOCKS - 1}"]
    assert f"{BLOCKS - 1} of {BLOCKS} blocks" in notes(report)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": ["gptq"]}, "other config.recipe"),
        ({"calibration": {"seed": 7}}, "other config.calibration, calibration tokens"),
        ({"output": {"resume": False}}, "output.resume is false"),
    ],
)
def test_another_configuration_does_not_use_the_work(
    change: dict[str, Any], said: str, folder: Path, half_done: Path
) -> None:
    made = {}
    for output in ("out", "out-fresh"):
        raw = job(folder, output).model_dump(mode="json")
        for key, value in change.items():
            raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
        report = done(type(job(folder, output)).model_validate(raw))
        made[output] = result(folder, output), notes(report)
    assert made["out"][0] == made["out-fresh"][0]
    assert f"is discarded: {said}" in made["out"][1] and "going on" not in made["out"][1]
    assert not half_done.exists()


@pytest.mark.usefixtures("half_done")
def test_another_model_or_thread_count_does_not_use_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "SHARE", 0.1)
    saved = folder / "model" / "model.safetensors"
    before = saved.stat().st_mtime_ns
    os.utime(saved, ns=(1, 1))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        report = done(job(folder, "out"))
    finally:
        torch.set_num_threads(threads)
    assert "is discarded: other model.model.safetensors, machine.threads" in notes(report)
    os.utime(saved, ns=(before, before))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("kind", ["state", "hidden", "block"])
def test_what_is_damaged_is_said_and_not_used(
    kind: str,
    damage: Callable[[Path], None],
    folder: Path,
    half_done: Path,
    whole: dict[str, bytes],
) -> None:
    newest = max(half_done.glob("*.state-*.json"))
    state = json.loads(newest.read_text())["state"]
    named = {"hidden": state["hidden"][0]["file"], "block": state["blocks"][-1]["file"]}
    damage(half_done / named[kind] if kind in named else newest)
    report = done(job(folder, "out"))
    gone = kind == "state" and damage is Path.unlink  # then nothing tells that it was there
    assert (f"{newest.name} is not used: " in notes(report)) is not gone
    assert f"going on after model.layers.0, 1 of {BLOCKS}" in notes(report)
    assert result(folder, "out") == whole


def test_without_any_whole_state_it_starts_anew(
    folder: Path, half_done: Path, whole: dict[str, bytes]
) -> None:
    for path in half_done.glob("*.state-*.json"):
        flip(path)
    report = done(job(folder, "out"))
    assert notes(report).count("is not used") == 2 and "going on" not in notes(report)
    assert result(folder, "out") == whole


def test_killed_before_the_report_the_checkpoint_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Report, "write", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            done(job(folder, "out"))
    with pytest.raises(CheckpointError, match="holds a ptq checkpoint already"):
        done(job(folder, "out", recipe=["gptq"]))  # not this one's
    with monkeypatch.context() as patch:
        patch.setattr(Report, "write", lambda *_: (_ for _ in ()).throw(Killed))
        shutil.rmtree(folder / "out")
        with pytest.raises(Killed):
            done(job(folder, "out"))
    before = result(folder, "out")
    done(job(folder, "out"))
    assert result(folder, "out") == before and (folder / "out" / "report.json").is_file()
    assert not (folder / "out.work").exists()


def test_the_work_directory_is_not_anyone_elses(folder: Path) -> None:
    root = folder / "out.work"
    root.mkdir()
    (root / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match=r"out\.work is where .* ptq did not make it; move"):
        done(job(folder, "out"))
    assert (root / "thesis.txt").is_file()
    (root / "thesis.txt").unlink()
    held = files.lock(root)
    with pytest.raises(CheckpointError, match="another run works in"):
        done(job(folder, "out"))
    os.close(held)
    done(job(folder, "out"))


def test_progress_is_kept_no_more_often_than_its_share_of_the_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "SHARE", 1e-9)
    kept: list[str] = []
    write = work.write_state
    monkeypatch.setattr(work, "write_state", lambda p, s: (kept.append(p.name), write(p, s)))
    done(job(folder, "out"))
    assert kept == [f"model.layers.0.state-{n:05}.json" for n in (1, BLOCKS)]


def test_a_disk_without_room_for_the_work_is_refused_before_it_begins(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = done(job(folder, "out-whole"))
    room = int(whole.sections["plan"]["bytes_after"] * 1.02) + 100
    disk = SimpleNamespace(f_bavail=room, f_frsize=1, f_blocks=room)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    config = job(folder, "out")
    with pytest.raises(CheckpointError, match="out needs .* MB, its disk has"):
        done(config)
    assert not (folder / "out").exists()
    # Every block once more, and hidden states of 3 x 16 tokens, 16 wide, old and new, twice.
    states = 4 * 3 * 16 * 16 * 4
    disk.f_bavail += whole.sections["plan"]["bytes_after"] + states
    assert done(config)
