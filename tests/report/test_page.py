"""The page: its numbers are the report's, it asks for nothing, and no text can break out of it."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from make_report import main as make_report

import ptq
from ptq.errors import CheckpointError
from ptq.report.page import render, report_page
from tests.report.conftest import DIAGNOSIS, SEARCH
from tests.report.parsed import Page, shown

ROOT = Path(__file__).parents[2]


def value_at(sections: Any, path: str) -> Any:
    for key in path.split("."):
        sections = sections[int(key)] if isinstance(sections, list) else sections[key]
    return sections


def test_every_number_is_that_of_the_report(sections: dict[str, Any]) -> None:
    page = Page(render(sections))
    numbers = page.all("data")
    for node in numbers:
        expected = value_at(sections, node.attributes["data-path"])
        assert float(node.attributes["value"]) == expected, node
        if "token-kl" in node.classes:
            continue  # its text is the token; the number is shown by the style sheet
        found, rounding = shown(node.text)
        if node.text[0] in "+-" and node.text.endswith("%"):
            found += 1  # a change
        # Python rounds what lies in the middle to even, and short numbers to their last digit.
        assert abs(found - expected) <= rounding * 1.0001 + 1e-12, node
    paths = {node.attributes["data-path"] for node in numbers}
    for path in (
        "plan.bytes_before", "plan.bytes_after", "plan.compression", "evaluation.ratio",
        "evaluation.ratio_low", "evaluation.ratio_high", "evaluation.float_perplexity",
        "evaluation.quantized_perplexity", "evaluation.kl_mean", "evaluation.kl_p50",
        "evaluation.kl_p90", "evaluation.kl_p95", "evaluation.kl_p99", "evaluation.kl_p999",
        "evaluation.kl_max", "evaluation.top1_agreement", "evaluation.top5_agreement",
        "speed.decode.speed", "speed.prompt.speed_low", "resources.peak_memory_bytes",
        "diagnosis.whole_kl", "diagnosis.remedies.0.kl_after", "search.chosen.kl",
        "search.measured.0.ratio", "tokens.worst.0.kl", "tokens.windows.0.kl.1",
    ):  # fmt: skip
        assert path in paths, path
    errors = {f"weights.layers.{i}.sqnr_db" for i in range(len(sections["weights"]["layers"]))}
    assert errors <= paths


def test_no_number_is_anywhere_else(sections: dict[str, Any]) -> None:
    """But in names and texts (verbatim), along axes, and in a few fixed phrases."""
    fixed = r"95\s%|90\s%|99\s%|99\.9\s%|count from 0|; 0 is the same"
    for node, text in Page(render(sections)).texts:
        if node.tag in ("data", "style", "title") or node.within("verbatim", "tick", "scale"):
            continue
        assert not re.search(r"\d", re.sub(fixed, "", text)), (node, text)


def test_nothing_is_asked_for(sections: dict[str, Any]) -> None:
    text = render(sections)
    page = Page(text)
    assert not page.all("script") and not page.all("img") and not page.all("iframe")
    for node in page.nodes:
        assert not {"src", "srcset", "action", "data", "poster"} & set(node.attributes), node
        assert node.attributes.get("href", "#").startswith("#") or node.tag == "link", node
        assert not [key for key in node.attributes if key.startswith("on")], node
    assert [node.attributes for node in page.all("link")] == [{"rel": "icon", "href": "data:,"}]
    style = page.all("style")[0].text
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    policy = [n.attributes["content"] for n in page.all("meta") if "http-equiv" in n.attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='x' &lt;"


def hostile(value: Any) -> Any:
    """The same report with that behind every text in it."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_texts_cannot_break_out(sections: dict[str, Any]) -> None:
    bad = {**hostile(sections), "config": {HOSTILE: HOSTILE, "model": {"id": f"a/b{HOSTILE}"}}}
    bad["environment"][HOSTILE] = {HOSTILE: HOSTILE}
    bad["kernels"]["layers"][0]["kernels"][0]["not"] = {HOSTILE: HOSTILE}
    page = Page(render(bad))
    plain = Page(render(sections))
    # The parser would find tags that the clean page has not.
    assert {node.tag for node in page.nodes} == {node.tag for node in plain.nodes}
    names = {key for node in plain.nodes for key in node.attributes}
    assert {key for node in page.nodes for key in node.attributes} == names
    whole = "".join(text for _, text in page.texts)
    assert whole.count("<script>alert(1)</script>") > 50


def test_older_reports_are_drawn(sections: dict[str, Any]) -> None:
    """Whatever section is missing, down to none at all."""
    for name in sections:
        Page(render({key: value for key, value in sections.items() if key != name}))
    assert "not measured" in render({})
    new = ("size", "weights", "inputs", "tokens", "speed", "diagnosis", "search")
    older = {key: value for key, value in sections.items() if key not in new}
    for key in ("kl_p50", "kl_p90", "kl_p95", "kl_p999", "kl_max", "top5_agreement"):
        del older["evaluation"][key]
    page = Page(render(older))
    assert {n.attributes["data-path"] for n in page.all("data")} >= {"evaluation.ratio"}
    assert "not measured" in page.all("dl")[0].text  # the speed


def test_an_interval_without_an_upper_end(sections: dict[str, Any]) -> None:
    sections["evaluation"]["ratio_low"], sections["evaluation"]["ratio_high"] = 0.0, None
    verdict = Page(render(sections)).all("dl")[0].text
    assert "unknown" in verdict and "no difference was shown" in verdict


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(0.99, 1.01, True), (1.01, 1.2, False), (0.8, 0.9, False)]
)
def test_the_verdict_says_whether_a_difference_was_shown(
    sections: dict[str, Any], low: float, high: float, shown: bool
) -> None:
    sections["evaluation"] |= {"ratio_low": low, "ratio_high": high}
    assert ("no difference" in Page(render(sections)).all("dl")[0].text) == shown


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("evaluation.kl_mean", "0.5", "key 'evaluation.kl_mean': .* got '0.5'"),
        ("plan.layers", 3, "key 'plan.layers': .* list"),
        ("tokens.windows.0.kl", [None], "key 'tokens.windows.0': 64 pieces of text and 1 diverg"),
        ("weights.histograms.0.before", [], "key 'weights.histograms.0.before'"),
        ("notes", {"a": 1}, "key 'notes'"),
        ("data.evaluation", "text", "key 'data.evaluation'"),
        ("search", {"points": [], "chosen": {"bytes": 1, "kl": 0.1}}, "key 'search.points'"),
    ],
)
def test_a_damaged_report_names_the_key(
    sections: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    path, _, last = key.rpartition(".")
    parent = value_at(sections, path) if path else sections
    parent[last] = value
    with pytest.raises(CheckpointError, match=expected) as caught:
        render(sections)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "damaged: .*line 1"), ("[]", "holds a list"), (None, "has no report.json")],
)
def test_a_file_that_is_no_report(tmp_path: Path, text: str | None, expected: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=expected):
        report_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_run_writes_the_page_and_the_script_draws_it_again(
    small_run: Path,
    tmp_path: Path,
    sections: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = (small_run / "report.html").read_text()
    (tmp_path / "report.json").write_text((small_run / "report.json").read_text())
    assert make_report([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == written
    (tmp_path / "search.json").write_text(json.dumps(SEARCH))
    (tmp_path / "diagnosis.json").write_text(json.dumps(DIAGNOSIS))
    assert report_page(tmp_path).read_text() == render(sections)
    (tmp_path / "search.json").write_text('{"points"')
    assert make_report([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "search.json" in said and said.count("\n") == 1


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text((small_run / "report.json").read_text())
    (tmp_path / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        report_page(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_checkpoint_with_a_page_can_be_replaced(small_run: Path, tmp_path: Path) -> None:
    model = ptq.load(small_run)
    ptq.save(model, tmp_path / "out")
    for name in ("report.html", "search.json", "diagnosis.json"):
        (tmp_path / "out" / name).write_text("{}")
    ptq.save(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_large_model_has_a_small_page(sections: dict[str, Any]) -> None:
    """A hundred blocks of 30 layers each, as mixtures of experts have."""
    one, error = sections["plan"]["layers"][5], sections["weights"]["layers"][0]
    names = [f"model.layers.{b}.mlp.experts.{i}.up_proj" for b in range(100) for i in range(30)]
    sections["plan"]["layers"] = [{**one, "name": name} for name in names]
    sections["weights"]["layers"] = [{**error, "name": name} for name in names]
    text = render(sections)
    assert len(text.encode()) < 2_000_000
    assert text.count("<data") > 1000


def test_layers_are_coloured_by_their_error(sections: dict[str, Any]) -> None:
    """The cell of a layer is darker, the lower its signal-to-noise ratio."""
    cells = [node for node in Page(render(sections)).nodes if "cell" in node.classes]
    levels = {}
    for cell in cells:
        name = re.match(r"[\w.]+?_proj", cell.text)
        assert name is not None
        levels[name[0]] = next(int(c[1]) for c in cell.classes if re.fullmatch(r"s\d", c))
    errors = {row["name"]: row["sqnr_db"] for row in sections["weights"]["layers"]}
    assert set(levels) == set(errors)
    order = sorted(errors, key=lambda name: errors[name])
    assert [levels[name] for name in order] == sorted(levels.values(), reverse=True)
    assert levels[order[0]] == 6 and levels[order[-1]] == 0


def test_tokens_are_coloured_by_their_divergence(sections: dict[str, Any]) -> None:
    sections["tokens"]["windows"][0]["kl"][1:8] = [0.0, 0.0299, 0.03, 0.3, 1.99, 2.0, 50.0]
    nodes = [n for n in Page(render(sections)).all("data") if "token-kl" in n.classes]
    levels = [next(c for c in n.classes if c != "token-kl") for n in nodes[:7]]
    assert levels == ["s0", "s0", "s1", "s3", "s4", "s5", "s6"]
    text = "".join(node.text for node in nodes[: len(sections["tokens"]["windows"][0]["kl"]) - 1])
    assert text == "".join(sections["tokens"]["windows"][0]["pieces"][1:])


def test_differences_of_generated_texts_are_marked(sections: dict[str, Any]) -> None:
    one = {"prompt": "x", "float": "one two three.", "quantized": "one 2 three, four."}
    other = {"prompt": "y", "float": "a b", "quantized": "a c"}
    for made, expected in (
        (one, ["two", "2", ", four"]),  # of an older report
        ({"samples": [one, other]}, ["two", "2", ", four", "b", "c"]),
    ):
        sections["generation"] = made
        page = Page(render(sections))
        assert [node.text for node in page.all("mark")] == expected


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("block", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough_to_read(block: int) -> None:
    style = (ROOT / "ptq" / "report" / "page" / "style.css").read_text()
    roots = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colors = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", roots[block]))
    assert len(colors) == 22
    for text in ("ink", "muted", "accent"):
        assert contrast(colors[text], colors["paper"]) >= 4.5, text
    assert contrast(colors["ink"], colors["faint"]) >= 4.5
    assert contrast(colors["ink"], colors["mark"]) >= 4.5
    for level in range(7):
        assert contrast(colors[f"s{level}"], colors[f"on{level}"]) >= 4.5, level
    # The scale is one of brightness, which those see who do not see colours.
    scale = [colors[f"s{level}"] for level in range(7)]
    assert sorted(scale, key=luminance, reverse=block == 0) == scale
    assert all(contrast(a, b) > 1.1 for a, b in pairwise(scale))


def test_plots_have_words_for_those_who_do_not_see_them(sections: dict[str, Any]) -> None:
    plots = Page(render(sections)).all("svg")
    assert len(plots) > 10
    for plot in plots:
        assert plot.attributes["role"] == "img" and len(plot.attributes["aria-label"]) > 20


@pytest.mark.parametrize(
    "found",
    [
        {"kind": "encoder", "cosine_mean": 0.9963, "cosine_p05": 0.99, "cosine_p01": 0.98,
         "cosine_min": 0.97, "spearman": 0.9957, "texts": 177},
        {"kind": "images", "top1_agreement": 0.91, "top5_agreement": 0.97, "kl_mean": 0.02,
         "kl_max": 0.4, "images": 50},
    ],
)  # fmt: skip
def test_models_that_predict_no_next_token(sections: dict[str, Any], found: dict[str, Any]) -> None:
    others = {k: v for k, v in sections.items() if k not in ("evaluation", "tokens", "kv_cache")}
    page = Page(render({**others, "evaluation": found}))
    shown_at = {n.attributes["data-path"]: n.attributes["value"] for n in page.all("data")}
    for key, value in found.items():
        if key != "kind":
            assert float(shown_at[f"evaluation.{key}"]) == value
    assert "perplexity" not in page.all("dl")[0].text
