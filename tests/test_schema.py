"""The JSON schema of the config: it says what pydantic and the registries check."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from ptq.config import ActivationScheme, QuantizationConfig, load_config, preset
from ptq.errors import ConfigError
from ptq.observers import OBSERVERS, make_observer
from ptq.presets import PRESETS
from ptq.recipe import make_recipe
from ptq.schema import OBSERVED, STEPS, config_schema

ROOT = Path(__file__).parent.parent
SCHEMA = config_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
KNOWN_STEPS = {name for name in STEPS if name != "auto"}


def accepted(raw: Any) -> bool:
    """By the code that a run goes through before the model is looked at."""
    try:
        config = QuantizationConfig.model_validate(raw)
        make_recipe(config.recipe, config.scheme)
        if config.calibration is not None:
            make_observer(config.calibration.observer, ActivationScheme())
    except (ValueError, ConfigError):  # pydantic's error is a ValueError
        return False
    return True


def test_the_shipped_schema_is_the_generated_one() -> None:
    shipped = (ROOT / "docs" / "ptq.schema.json").read_text()
    assert json.loads(shipped) == SCHEMA, "run: ptq schema > docs/ptq.schema.json"
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    text = path.read_text()
    first, _, _ = text.partition("\n")
    assert first == "# yaml-language-server: $schema=../docs/ptq.schema.json"
    assert (path.parent / first.partition("$schema=")[2]).is_file()
    VALIDATOR.validate(yaml.safe_load(text))
    assert load_config(path)


def test_steps_and_observers_are_those_of_the_registries() -> None:
    with pytest.raises(ConfigError) as error:
        make_recipe(QuantizationConfig.model_validate({"scheme": "w8a8", "recipe": "?"}).recipe,
                    preset("w8a8"))  # fmt: skip
    assert {w.strip("?'") for w in str(error.value).split("known steps: ")[1].split(", ")} == set(
        STEPS
    )
    assert set(OBSERVED) == set(OBSERVERS)


def sections(node: Any, where: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every key that a config may have, with what the schema says of it."""
    found = []
    if isinstance(node, dict):
        for key, value in node.get("properties", {}).items():
            found.append((f"{where}.{key}", value))
        for key, value in node.items():
            if key not in ("if", "then", "else", "allOf"):  # conditions, not keys
                found += sections(value, f"{where}/{key}")
    if isinstance(node, list):
        for child in node:
            found += sections(child, where)
    return found


def test_every_key_is_explained() -> None:
    keys = sections(SCHEMA)
    assert len(keys) > 80
    for where, said in keys:
        assert said.get("title"), where
        assert said.get("description"), where


def test_every_text_without_a_default_has_an_example() -> None:
    """Nothing else tells the user of an editor what to type."""
    for where, said in sections(SCHEMA):
        kinds = [said, *said.get("anyOf", [])]
        free = any(k.get("type") == "string" and "enum" not in k for k in kinds)
        if free and said.get("default") is None:
            assert any(k.get("examples") for k in kinds), where


@pytest.mark.parametrize(
    "text",
    [
        "modle: x",
        "scheme: w8a9",
        "scheme: w4a16-g4",
        "scheme: w4a16-g64-static",
        "scheme: [w8a8]",
        "scheme: {weights: {format: int9}}",
        "scheme: {weights: {granularity: group}}",
        "scheme: {weights: {granularity: channel, group_size: 64}}",
        "scheme: {weights: {symmetric: false, signed_scale: true}}",
        "scheme: {weights: {format: float8_e4m3fn, symmetric: false}}",
        "scheme: {weights: {format: float8_e4m3fn}, activations: {}}",
        "scheme: {activations: {format: float8_e4m3fn}}",
        "scheme: {weights: {format: float8_e4m3fn}, activations: {format: float8_e4m3fn, mode: "
        "static}}",
        "scheme: {input_rotation: hadamard}",
        "scheme: w8a8\nrules: x",
        "scheme: w8a8\nrules: [{layers: x}]",
        "scheme: w8a8\nrules: [{layers: x, scheme: flaot}]",
        "scheme: w8a8\nembeddings: w8a8",
        "scheme: w8a8\nembeddings: {activations: {}}",
        "scheme: w8a8\nrecipe: gtpq",
        "scheme: w8a8\nrecipe: [rtn, {name: gptq, options: {damp: 0.1}}]",
        "scheme: w8a8\nrecipe: {name: gptq, options: {damping: 2}}",
        "scheme: w8a8\nrecipe: {options: {damping: 0.1}}",
        "scheme: w8a8\ncalibration: {samples: 8}",
        "scheme: w8a8\ncalibration: {data: []}",
        "scheme: w8a8\ncalibration: {data: x, samples: 0}",
        "scheme: w8a8\ncalibration: {data: x, samples: many}",
        "scheme: w8a8\ncalibration: {data: x, observer: minimax}",
        "scheme: w8a8\ncalibration: {data: x, observer: {name: mse, options: {percentile: 99}}}",
        "scheme: w8a8\nmodel: ''",
        "scheme: w8a8\nmodel: {id: x, dtype: int8}",
        "scheme: w8a8\noutput: {dir: x, overwrite: yes please}",
        "scheme: w8a8\ngeneration: {prompt: ' '}",
        "scheme: w8a8\nkv_cache: int3",
        "scheme: w8a8\nkv_cache: {bits: 4, window: -1}",
        "scheme: w8a8\ntied_embeddings: tie",
    ],
)
def test_mistakes_are_caught(text: str) -> None:
    raw = yaml.safe_load(text)
    assert not accepted(raw)
    assert not VALIDATOR.is_valid(raw)


JUNK = st.sampled_from([None, True, 0, -1, 1, 7, 8, 2.5, "", "x", "float", [], {}, ["x"]])


def keys(**values: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these keys with values that mostly fit; now and then one that nobody knows."""
    optional = {k: v if isinstance(v, st.SearchStrategy) else st.sampled_from(v)
                for k, v in values.items()}  # fmt: skip
    mostly = {k: st.one_of(v, v, v, v, v, v, JUNK) for k, v in optional.items()}
    plain = st.fixed_dictionaries({}, optional=mostly)
    return st.one_of(plain, plain, plain, plain.map(lambda made: {**made, "unknwon": 1}))


FLAG = [True, False]
SCHEME_NAME = st.one_of(
    st.sampled_from([*PRESETS, "w4a16-g7", "w4a16-tensor-static", "w1a16", "w8a8-g08", "W8A8"]),
    st.from_regex(r"w[1-9]a(16|8|4)(-g(0?[0-9]{1,3})|-tensor)?(-asym)?(-static)?", fullmatch=True),
)
FULL_SCHEME = keys(
    weights=keys(
        format=["int4", "int8", "float8_e4m3fn"], symmetric=FLAG,
        granularity=["tensor", "channel", "group"], group_size=[None, 8, 64, 7],
        scale_dtype=["float16", "float32"], signed_scale=FLAG, power_of_two_scale=FLAG,
    ),
    activations=st.one_of(st.none(), keys(
        format=["int8", "float8_e4m3fn"], mode=["static", "dynamic"], symmetric=FLAG,
    )),
    input_rotation=[None, "hadamard"],
)  # fmt: skip
SCHEME = st.one_of(SCHEME_NAME, FULL_SCHEME, st.just("float"))
OPTIONS = keys(
    damping=[0.01, 0.0, 1], act_order=FLAG, grid=[20, 0], iterations=[1, 0], gain=[0.1, 1.0],
    strength=[0.5, "search", "much"], percentile=[99.9, 50], learning_rate=[None, 1e-3, 0],
)  # fmt: skip


def plugin(names: list[str]) -> st.SearchStrategy[Any]:
    name = st.sampled_from([*names, "gtpq"])
    return st.one_of(name, keys(name=name, options=OPTIONS))


# One step: that steps are in order, and that hqq is for integers, a schema does not say.
STEP = plugin(sorted(KNOWN_STEPS - {"hqq"}))
DATA = st.sampled_from(["a.txt", ["a.txt", "b.txt"]])
CONFIG = keys(
    scheme=SCHEME,
    model=st.one_of(st.just("a/b"), keys(id=["a/b"], dtype=["auto", "float64"], stream=FLAG)),
    rules=st.lists(keys(layers=["*", "re:x"], scheme=SCHEME), max_size=2),
    embeddings=SCHEME,
    recipe=st.one_of(STEP, STEP.map(lambda step: [step])),
    tied_embeddings=["keep", "untie"],
    calibration=st.one_of(DATA, keys(
        data=DATA, samples=[1, 0], sequence_length=[2, 1], seed=[0, 1 << 63],
        observer=plugin(sorted(OBSERVERS)),
    )),
    evaluation=st.one_of(DATA, keys(data=DATA, windows=[1, 0], context=[2, 1])),
    generation=keys(
        prompt=["a", " ", ["a", "b"], ["a", " "], []], max_new_tokens=[1, 0], chat=FLAG
    ),
    kv_cache=st.one_of(st.sampled_from(["int8", "int4", "int3"]), keys(
        bits=[4, 8, 5], keys=["token", "channel"], key_group_size=[None, 8, 7], window=[0, 64],
    )),
    output=st.one_of(st.just("out"), keys(dir=["out"], dtype=["auto", "int8"])),
)  # fmt: skip


FITTING = st.fixed_dictionaries({}, optional={
    "weights": st.fixed_dictionaries({}, optional={
        "format": st.sampled_from(["int4", "float8_e4m3fn", "float8_e4m3fn"]),
        "symmetric": st.booleans(),
        "granularity": st.sampled_from(["tensor", "channel", "group"]),
        "group_size": st.sampled_from([None, 8, 64]),
        "signed_scale": st.booleans(),
    }),
    "activations": st.none() | st.fixed_dictionaries({}, optional={
        "format": st.sampled_from(["int8", "float8_e4m3fn"]),
        "mode": st.sampled_from(["static", "dynamic"]),
        "symmetric": st.booleans(),
    }),
})  # fmt: skip
"""Schemes whose values all fit by themselves: what is wrong is wrong across keys."""


@settings(max_examples=300, deadline=None)
@given(FITTING)
def test_the_schema_knows_what_goes_with_what(scheme: dict[str, Any]) -> None:
    whole = {"scheme": scheme}
    assert VALIDATOR.is_valid(whole) == accepted(whole), whole


@settings(max_examples=120, deadline=None)
@given(CONFIG, SCHEME_NAME)
def test_the_schema_agrees_with_pydantic(raw: dict[str, Any], name: str) -> None:
    whole = {"scheme": name, **raw}
    assert VALIDATOR.is_valid(whole) == accepted(whole), whole
    alone = {"scheme": raw.get("scheme", name)}
    assert VALIDATOR.is_valid(alone) == accepted(alone), alone
    for key, value in raw.items():  # one section at a time: most are not spoilt by another
        part = {"scheme": "w8a8", key: value}
        assert VALIDATOR.is_valid(part) == accepted(part), part
