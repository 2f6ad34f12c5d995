"""Figures for notebooks show what the report says."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptq.errors import ConfigError
from ptq.report.figures import layer_map, size_quality, token_kl, weight_histogram
from tests.report.conftest import SEARCH


def test_the_layer_map(small_run: Path, sections: dict[str, Any]) -> None:
    figure = layer_map(small_run)
    ax = figure.axes[0]
    shown = ax.images[0].get_array()
    kinds = [label.get_text() for label in ax.get_yticklabels()]
    for row in sections["weights"]["layers"]:
        block, kind = row["name"].removeprefix("model.layers.").split(".", 1)
        assert shown[kinds.index(kind), int(block)] == pytest.approx(row["sqnr_db"])
    assert np.asarray(shown).size == len(sections["weights"]["layers"])


def test_weight_histograms(sections: dict[str, Any]) -> None:
    for seen in sections["weights"]["histograms"][::5]:
        ax = weight_histogram(sections, seen["name"]).axes[0]
        before, after = ([bar.get_height() for bar in c] for c in ax.containers)
        width = (seen["high"] - seen["low"]) / len(before)
        assert sum(before) * width == pytest.approx(1)
        assert np.array(before) / max(before) == pytest.approx(
            np.array(seen["before"]) / max(seen["before"])
        )
        assert np.array(after) / max(after) == pytest.approx(
            np.array(seen["after"]) / max(seen["after"])
        )
    first = weight_histogram(sections).axes[0].get_title()
    assert first == sections["weights"]["histograms"][0]["name"]
    with pytest.raises(ConfigError, match="no histogram of layer nowhere; it has model"):
        weight_histogram(sections, "nowhere")


def test_divergence_of_tokens(sections: dict[str, Any]) -> None:
    window = sections["tokens"]["windows"][1]
    x, y = token_kl(sections, 1).axes[0].lines[0].get_data()
    assert list(x) == list(range(1, 64))
    assert list(y) == window["kl"][1:]
    with pytest.raises(ConfigError, match="2 windows; 2 is none"):
        token_kl(sections, 2)


def test_the_search(small_run: Path, sections: dict[str, Any], tmp_path: Path) -> None:
    ax = size_quality(sections).axes[0]
    x, y = ax.lines[0].get_data()
    assert list(zip(x, y, strict=True)) == [(p["bytes"] / 1e6, p["kl"]) for p in SEARCH["points"]]
    assert ax.lines[-1].get_xydata().tolist() == [[90.0, 0.0617]]
    with pytest.raises(ConfigError, match="no section 'search'"):
        size_quality(small_run)
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "search.json").write_text(json.dumps(SEARCH))
    assert size_quality(tmp_path).axes[0].get_xlabel() == "size, MB"


def test_without_matplotlib(sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="need matplotlib: pip install"):
        token_kl(sections)
