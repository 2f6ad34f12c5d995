"""Few rules that say exactly what was chosen."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.config import preset
from ptq.mixed_precision.rules import base_scheme, write_rules
from ptq.planning import matches

W3, W4, W8 = (preset(f"w{bits}a16") for bits in (3, 4, 8))
LEAVES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NAMES = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in LEAVES]


def applied(rules, base, names):
    """What later-wins rules give each layer."""
    found = dict.fromkeys(names, base)
    for rule in rules:
        found |= {name: rule.scheme for name in names if matches(rule.pattern, name)}
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.9]), st.booleans())
def test_rules_give_each_layer_its_scheme(seed: int, noise: float, experts: bool) -> None:
    pick = random.Random(seed)
    names = [*NAMES, "first", "score.dense"]
    if experts:
        names += [f"model.layers.{i}.experts.{j}.up" for i in (1, 2) for j in range(3)]
    usual = {name.rpartition(".")[2]: pick.choice([W3, W4, None]) for name in names}
    schemes = {
        name: pick.choice([W3, W4, W8, None])
        if pick.random() < noise
        else usual[name.rpartition(".")[2]]
        for name in names
    }
    base = base_scheme(schemes) or W4
    rules = write_rules(schemes, base)
    assert applied(rules, base, names) == schemes
    for rule in rules:
        assert all(schemes[name] == rule.scheme for name in rule.layers)


def test_whole_kinds_are_globs_and_exceptions_lists() -> None:
    schemes = dict.fromkeys(NAMES, W4) | {n: W8 for n in NAMES if n.endswith("down_proj")}
    schemes |= {f"model.layers.{i}.mlp.down_proj": W3 for i in (3, 10)}
    schemes |= {f"model.layers.{i}.self_attn.{p}_proj": None for i in (0, 1) for p in "qk"}
    rules = write_rules(schemes, W4)
    assert [rule.pattern for rule in rules] == [
        r"re:model\.layers\.(0|1)\.self_attn\.(q_proj|k_proj)",
        "*.mlp.down_proj",
        r"re:model\.layers\.(3|10)\.mlp\.down_proj",
    ]


def test_alike_kinds_of_all_blocks_need_no_list() -> None:
    schemes = dict.fromkeys(NAMES, W4) | {n: W8 for n in NAMES if n.endswith(("q_proj", "k_proj"))}
    (rule,) = write_rules(schemes, W4)
    assert rule.pattern == r"re:model\.layers\.\d+\.self_attn\.(q_proj|k_proj)"


@pytest.mark.parametrize(
    "other", ["vision.layers.0.mlp.down_proj", "model.layers.77.mlp.down_proj"]
)
def test_other_layers_are_not_hit(other: str) -> None:
    schemes = dict.fromkeys(NAMES, W4) | {n: W8 for n in NAMES if n.endswith("down_proj")}
    (rule,) = write_rules(schemes, W4, [other])
    assert not matches(rule.pattern, other)


def test_most_is_the_base() -> None:
    assert base_scheme({"a": None, "b": None, "c": W8, "d": W4, "e": W4}) == W4
    assert base_scheme({"a": None}) is None
    assert write_rules(dict.fromkeys(NAMES, W4), W4) == []
