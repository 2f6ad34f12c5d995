"""Conditions on figures: their grammar, their names, and what violates them."""

import math

import pytest

from ptq.errors import ConfigError, GateError
from ptq.evaluation import (
    Evaluation,
    Perplexity,
    known_figures,
    parse_conditions,
    require_none,
    violations,
)
from ptq.evaluation.gate import figure_names

KNOWN = ["kl_mean", "ratio_high", "kv_cache.ratio", "tasks.*"]


@pytest.mark.parametrize(
    ("text", "value", "violated"),
    [
        ("kl_mean > 0.05", 0.05, False),
        ("kl_mean > 0.05", 0.0501, True),
        ("kl_mean >= 0.05", 0.05, True),
        ("kl_mean<5e-2", 0.049, True),
        ("kl_mean < .05", 0.05, False),
        ("  kl_mean <= 5.e-2  ", 0.05, True),
        ("kl_mean > -1", 0.0, True),
        ("kl_mean > 1", math.inf, True),
    ],
)
def test_comparisons(text: str, value: float, violated: bool) -> None:
    found = violations(parse_conditions([text], KNOWN), {"kl_mean": value})
    assert bool(found) is violated


@pytest.mark.parametrize("value", [None, math.nan, "0.1", {"a": 1}])
@pytest.mark.parametrize("text", ["ratio_high > 2", "ratio_high < 2"])
def test_what_is_not_known_violates_every_condition(text: str, value: object) -> None:
    lines = violations(parse_conditions([text], KNOWN), {"ratio_high": value})
    assert lines == [f"{text}: ratio_high is not known"]
    assert violations(parse_conditions([text], KNOWN), {}) == lines


def test_nested_figures_and_one_line_for_each() -> None:
    texts = ["kv_cache.ratio > 1.001", "tasks.words-1.accuracy < 0.9", "kl_mean > 1"]
    figures = {
        "kl_mean": 0.5,
        "kv_cache": {"ratio": 1.0123456},
        "tasks": {"words-1": {"accuracy": 0.25}},
    }
    lines = violations(parse_conditions(texts, KNOWN), figures)
    assert lines == [
        "kv_cache.ratio > 1.001: kv_cache.ratio is 1.01235",
        "tasks.words-1.accuracy < 0.9: tasks.words-1.accuracy is 0.25",
    ]
    with pytest.raises(GateError, match="1.01235\ntasks"):
        require_none(lines)
    require_none([])


@pytest.mark.parametrize(
    "text",
    ["kl_mean", "> 0.05", "kl_mean > ", "kl_mean > x", "kl_mean > 1 or 1 > 0", "1 < kl_mean",
     "__import__('os') > 0", "kl_mean > 0.05; kl_mean", "kl_mean == 0", "kl_mean > 1e", ""],
)  # fmt: skip
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a figure, one of >  >=  <  <=, and a number"):
        parse_conditions([text], KNOWN)


def test_a_figure_that_there_will_not_be() -> None:
    with pytest.raises(ConfigError, match="no figure 'kl_man'; did you mean 'kl_mean'?"):
        parse_conditions(["kl_man > 1"], KNOWN)
    with pytest.raises(ConfigError, match="no figure 'kv_cache.rato'"):
        parse_conditions(["kv_cache.rato > 1"], KNOWN)


def test_names_are_those_of_the_results() -> None:
    names = figure_names(Evaluation)
    assert {"kl_mean", "ratio_high", "top1_agreement", "protocol.tokens_scored"} <= set(names)
    assert "protocol.dtype" not in names  # no number
    assert "cache.*" in names
    assert "perplexity" in figure_names(Perplexity)
    assert "cosine_p01" in known_figures("encoder")
    assert "kv_cache.kl_mean" in known_figures("causal")
    assert "kl_mean" not in known_figures("encoder")
    assert "tasks.*" in known_figures("causal", tasks=True)
    assert {"kl_mean", "cosine_min", "top5_agreement"} <= set(known_figures(None))
