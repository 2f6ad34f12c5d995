"""Budgets as people write them."""

import pytest

from ptq.config import preset
from ptq.errors import ConfigError
from ptq.mixed_precision import parse_budget, parse_budgets


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("90 MB", "bytes", 90e6),
        ("at most 90MB", "bytes", 90e6),
        ("1.5 GiB", "bytes", 1.5 * 2**30),
        ("12 bytes", "bytes", 12),
        ("4.5 bits", "bits", 4.5),
        ("At most 4.5 bits on average", "bits", 4.5),
        ("1% perplexity", "perplexity", 1),
        ("at most .5 % of perplexity", "perplexity", 0.5),
        ("2.5 ms", "milliseconds", 2.5),
    ],
)
def test_numbers(text: str, kind: str, value: float) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.value, budget.like, str(budget)) == (kind, value, None, text)


def test_of_another_scheme() -> None:
    fast, small = parse_budgets(["at least as fast as w8a8", "as small as w4a16-g64-asym"])
    assert (fast.kind, fast.value, fast.like) == ("milliseconds", None, preset("w8a8"))
    assert (small.kind, small.like) == ("bytes", preset("w4a16-g64-asym"))
    assert parse_budget("as fast as float").like is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("90", "budget '90' is not understood; give one such as"),
        ("-3 bits", "not understood"),
        ("0 MB", "expected more than zero"),
        ("as fast as w9a9", "unknown scheme 'w9a9'"),
        ([], "no budget"),
        (["90 MB", "1 GB"], "'90 MB' and '1 GB' are of one kind"),
    ],
)
def test_what_is_not_understood(given, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_budgets(given)
