"""config.json's quantization_config: what is written, and which layer gets what when reading."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ptq.checkpoint.compressed_tensors.groups import (
    Group,
    Groups,
    group_of,
    layout_of,
    parse_groups,
    quantization_config,
    scheme_of,
)
from ptq.config import preset
from ptq.errors import CheckpointError, UnsupportedError

WEIGHTS = {"num_bits": 4, "strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}
FLOAT_TOKEN = {**TOKEN, "type": "float"}


def parsed(**changes: Any) -> Groups:
    group = {"targets": ["Linear"], "weights": WEIGHTS}
    data = {"config_groups": {"group_0": group}, "format": "pack-quantized", **changes}
    return parse_groups(data, Path("config.json"))


def scheme(**group: Any) -> str:
    made = Group.model_validate({"targets": ["Linear"], "weights": WEIGHTS, **group})
    return str(scheme_of(made, "fc", "float16", False))


def test_one_scheme_targets_every_linear_layer() -> None:
    config = quantization_config({"a": preset("w8a8"), "b": preset("w8a8")}, ["lm_head"])
    assert list(config["config_groups"]) == ["group_0"]
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and config["ignore"] == ["lm_head"]
    assert group["format"] == config["format"] == "int-quantized"
    assert group["weights"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "dynamic": False,
    }
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"] is True


def test_several_schemes_name_their_layers() -> None:
    schemes = {"a": preset("w8a8"), "b": preset("w4a16-g32-asym"), "c": preset("w8a8")}
    config = quantization_config(schemes, [])
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["a", "c"], ["b"]] and config["format"] == "mixed-precision"
    groups = parse_groups(config, Path("config.json"))
    layer = nn.Linear(32, 32)
    for name, wanted in schemes.items():
        group = group_of(groups, [name], layer)
        assert group is not None
        assert str(scheme_of(group, name, "float32", False)) == str(wanted)
    assert group_of(groups, ["d"], layer) is None


def test_a_name_wins_over_an_expression_and_that_over_a_class() -> None:
    groups = parse_groups(
        {
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*skip.*"],
            "config_groups": {
                "by_class": {"targets": ["Linear"], "weights": {"num_bits": 2}},
                "by_expression": {"targets": ["re:.*down"], "weights": {"num_bits": 3}},
                "by_name": {"targets": ["a.down"], "weights": {"num_bits": 4}},
            },
        },
        Path("config.json"),
    )

    def bits(name: str, module: nn.Module) -> int | None:
        group = group_of(groups, [name], module)
        return None if group is None or group.weights is None else group.weights.num_bits

    layer = nn.Linear(4, 4)
    found = [bits(name, layer) for name in ("a.down", "b.down", "b.up", "lm_head", "b.skip")]
    assert found == [4, 3, 2, None, None]
    assert bits("b.norm", nn.LayerNorm(4)) is None
    assert bits("bdown", nn.Linear(4, 4)) == 3  # an expression matches from the start, to anywhere


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ({}, "w4a16-g32"),
        ({"weights": {**WEIGHTS, "symmetric": False}}, "w4a16-g32-asym"),
        ({"weights": {"num_bits": 8, "group_size": -1}}, "w8a16"),
        ({"weights": {"num_bits": 8}}, "w8a16-tensor"),
        ({"weights": {"strategy": "channel"}, "input_activations": TOKEN}, "w8a8"),
        (
            {"weights": {"strategy": "channel"}, "input_activations": {"symmetric": False}},
            "w8a8-static-aasym",
        ),
        ({"weights": FLOAT, "input_activations": FLOAT_TOKEN}, "fp8"),
        ({"weights": FLOAT}, "fp8-a16"),
        (
            {"weights": {**FLOAT, "strategy": "tensor"}, "input_activations": FLOAT_TOKEN},
            "fp8-tensor",
        ),
    ],
)
def test_schemes(group: dict[str, Any], wanted: str) -> None:
    assert scheme(**group) == wanted


@pytest.mark.parametrize(
    ("group", "named"),
    [
        ({"weights": {"type": "float", "num_bits": 4}}, "weights"),
        ({"weights": {**FLOAT, "symmetric": False}}, "weights"),
        ({"weights": {**FLOAT, "strategy": "block", "block_structure": [8, 8]}}, "weights"),
        ({"weights": FLOAT, "input_activations": TOKEN}, "input_activations"),
        ({"weights": FLOAT, "input_activations": {**FLOAT_TOKEN, "symmetric": False}}, "input_act"),
        (
            {"weights": FLOAT, "input_activations": {"type": "float", "strategy": "tensor"}},
            "input_activations",
        ),
        ({"weights": {"num_bits": 16}}, "weights"),
        ({"weights": None}, "weights"),
        ({"weights": {"strategy": "block", "block_structure": [8, 8]}}, "weights"),
        ({"weights": {"strategy": "group", "group_size": 4}}, "weights"),
        ({"input_activations": {**TOKEN, "type": "float"}}, "input_activations"),
        ({"input_activations": {**TOKEN, "num_bits": 4}}, "input_activations"),
        ({"input_activations": {"strategy": "tensor", "dynamic": True}}, "input_activations"),
        ({"output_activations": TOKEN}, "output_activations"),
    ],
)
def test_schemes_that_ptq_does_not_have(group: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=f"layer fc: {named}"):
        scheme(**group)


def test_what_is_refused() -> None:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        parsed(**{key: {}})
        with pytest.raises(UnsupportedError, match=f"quantization_config.{key}"):
            parsed(**{key: {"num_bits": 8}})
    with pytest.raises(UnsupportedError, match="quantization_status is 'frozen'"):
        parsed(quantization_status="frozen")
    with pytest.raises(CheckpointError, match=r"config_groups.group_0.weights.zip: Extra inputs"):
        parsed(config_groups={"group_0": {"targets": [], "weights": {"zip": 1}}})
    with pytest.raises(CheckpointError, match="not a regular expression"):
        group_of(parsed(ignore=["re:("]), ["a"], nn.Linear(2, 2))
    groups = parsed(format="marlin-24")
    with pytest.raises(UnsupportedError, match="layer fc is stored as 'marlin-24'"):
        layout_of(groups.config_groups["group_0"], groups, "fc")


def test_the_layout_is_that_of_the_weights_type() -> None:
    whole = {"targets": ["Linear"], "weights": FLOAT}
    for name in ("float-quantized", "naive-quantized"):
        groups = parsed(config_groups={"group_0": whole}, format=name)
        assert layout_of(groups.config_groups["group_0"], groups, "fc") == "float-quantized"
    groups = parsed(format="naive-quantized")
    assert layout_of(groups.config_groups["group_0"], groups, "fc") == "int-quantized"
    for group, name in (
        (whole, "int-quantized"),
        (whole, "pack-quantized"),
        ({**whole, "weights": WEIGHTS}, "float-quantized"),
    ):
        groups = parsed(config_groups={"group_0": group}, format=name)
        with pytest.raises(UnsupportedError, match=f"stored as '{name}' with"):
            layout_of(groups.config_groups["group_0"], groups, "fc")
