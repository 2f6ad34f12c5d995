"""The report, its summary, and what the console prints where."""

import json
from pathlib import Path

import pytest
import torch

from ptq.report import Console, Report, environment
from ptq.report.report import peak_memory_bytes


def test_written_whole_and_read_again(tmp_path: Path) -> None:
    report = Report({"plan": {"bytes_after": 1}})
    path = report.write(tmp_path)
    assert json.loads(path.read_text()) == report.sections
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = Report({"a": 1}).write(tmp_path)
    with pytest.raises(TypeError):
        Report({"a": object()}).write(tmp_path)
    assert json.loads(path.read_text()) == {"a": 1}


def test_summary_of_a_run_without_evaluation() -> None:
    plan = {
        "bytes_before": 4_000_000,
        "bytes_after": 1_000_000,
        "compression": 4.0,
        "quantized_share_of_parameters": 0.5,
    }
    shown = str(Report({"plan": plan}))
    assert "4.0 MB -> 1.0 MB" in shown
    assert "50.0% of the parameters" in shown
    assert "not measured" in shown


def test_environment_names_what_a_figure_depends_on() -> None:
    found = environment()
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"]
    json.dumps(found)


def test_peak_memory_counts_what_was_used() -> None:
    before = peak_memory_bytes()
    block = torch.ones(before // 4 + (64 << 20))  # float32: more than is resident so far
    assert peak_memory_bytes() > before
    assert peak_memory_bytes() >= block.nbytes


@pytest.mark.parametrize(
    ("mode", "out", "err"),
    [("normal", True, False), ("json", False, True), ("quiet", False, False)],
)
def test_where_words_go(
    mode: str, out: bool, err: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Console(mode).say("words")  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert ("words" in captured.out, "words" in captured.err) == (out, err)


def test_bars_show_the_stage_and_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.stage("quantize")
    assert list(console.bar("layer")(["model.layers.0.up_proj"])) == ["model.layers.0.up_proj"]
    shown = capsys.readouterr().err
    assert "quantize" in shown
    assert "layer" in shown
    quiet = Console("quiet")
    assert list(quiet.bar("layer")([1, 2])) == [1, 2]
    assert capsys.readouterr().err == ""
