"""The configuration: schemes by name, overrides, and mistakes with file, line and remedy."""

import json
from pathlib import Path

import pytest

from ptq.config import QuantizationConfig, Scheme, as_config, load_config, preset
from ptq.errors import ConfigError
from ptq.presets import PRESETS


@pytest.mark.parametrize("name", [*PRESETS, "w5a16", "w8a8-tensor", "w4a8-g32-asym-static"])
def test_names_round_trip(name: str) -> None:
    assert str(preset(name)) == name
    again = Scheme.model_validate(preset(name).model_dump())
    assert again == preset(name)


def test_what_the_names_mean() -> None:
    scheme = preset("w4a8-g64-asym-static")
    weights, activations = scheme.weights, scheme.activations
    assert (weights.format, weights.symmetric, weights.group_size) == ("int4", False, 64)
    assert activations is not None
    assert (activations.mode, activations.symmetric) == ("static", True)
    assert preset("w8a16").activations is None
    assert preset("w8a16").weights.granularity == "channel"


def test_defaults_are_resolved_when_parsed() -> None:
    assert preset("w4a16-g64").weights.scale_dtype == "float16"
    assert preset("w8a16").weights.scale_dtype == "float32"
    assert preset("w4a16-g64").weights.signed_scale
    assert not preset("w4a16-g64-asym").weights.signed_scale
    assert not preset("w8a16").weights.signed_scale


def load(tmp_path: Path, text: str, *overrides: str) -> QuantizationConfig:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_shorthands(tmp_path: Path) -> None:
    text = "model: a/b\nscheme: w8a8\noutput: out\ncalibration: {data: x.txt, observer: percentile}"
    config = load(tmp_path, text)
    assert config.model is not None
    assert config.output is not None
    assert config.calibration is not None
    assert (config.model.id, config.output.dir) == ("a/b", "out")
    assert config.calibration.data == ["x.txt"]
    assert config.calibration.observer.name == "percentile"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("scheme: w8a8\nmodle: x\n", 2, "unknown key 'modle'; did you mean 'model'?"),
        ("scheme: w8a8\nzzz: x\n", 2, "unknown key 'zzz'; known keys: scheme, model"),
        ("scheme: w8a8\noutput:\n  dri: x", 3, "unknown key 'output.dri'; did you mean 'dir'?"),
        ("scheme: {weights: {fromat: int4}}", 1, "did you mean 'format'?"),
        ("scheme: w8a8\nrules:\n- layers: a\n  shceme: float", 4, "did you mean 'scheme'?"),
        ("scheme: w8a9", 1, "unknown scheme 'w8a9': did you mean 'w8a8'?"),
        ("scheme: w4a16-g64-static", 1, "'static' needs 8-bit activations"),
        ("scheme: w8a8\ncalibration:\n  data: x\n  samples: many", 4, "valid integer"),
        ("scheme: w8a8\ncalibration: {data: x, samples: 0}", 2, "greater than or equal to 1"),
        ("scheme: w8a8\ncalibration: {data: []}", 2, "at least 1 item"),
        ("scheme: {weights: {format: int9}}", 1, "'int2', 'int3'"),
        ("scheme: {weights: {format: []}}", 1, "'int2', 'int3'"),
        ("scheme: {weights: {granularity: group}}", 1, "needs a group_size"),
        (
            "scheme: {weights: {granularity: channel, group_size: 64}}",
            1,
            "needs granularity 'group'",
        ),
        ("scheme: {weights: {symmetric: false, signed_scale: true}}", 1, "signed_scale needs"),
        ("scheme: w8a8\nrules:\n- layers: 're:('\n  scheme: float", 3, "not a regular expression"),
        ("scheme: w8a8\nmodel: [1]", 2, "model: expected a mapping of keys and values"),
        ("scheme: w8a8\nrules: x", 2, "rules: expected a list"),
        ("scheme: w8a8\nrules: [x]", 2, "rules.0: expected a mapping"),
        ("scheme: {weights: int4}", 1, "scheme.weights: expected a mapping"),
        ("scheme: W8A8", 1, "did you mean 'w8a8'?"),
        ("scheme: w8a8\nmodel: ''", 2, "model.id: must not be empty"),
        ("scheme: w8a8\noutput: ''", 2, "output.dir: must not be empty"),
        ("scheme: w8a8\ngeneration: {prompt: ' '}", 2, "generation.prompt.0: must not be blank"),
        ("scheme: w8a8\ncalibration: {data: x, seed: 99999999999999999999}", 2, "seed"),
        ("scheme: w8a8\ncalibration: {data: x, seed: -1}", 2, "greater than or equal to 0"),
        ("scheme: w8a8\nscheme: w8a16", 2, "key 'scheme' is given twice"),
        ("scheme: [w8a8\nmodel: b: c", 2, "not valid YAML"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, line: int, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    message = str(error.value)
    assert expected in message
    assert str(tmp_path / "recipe.yaml") in message
    assert f"line {line}" in message
    assert "\n" not in message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "schema: w8a8\nmodle: x\n")
    for expected in ("'schema'", "'modle'", "key 'scheme' is required"):
        assert expected in str(error.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="holds a str"):
        load(tmp_path, "just words")
    with pytest.raises(ConfigError, match="holds nothing"):
        load(tmp_path, "")


def test_overrides(tmp_path: Path) -> None:
    text = "model: a/b\nscheme: w8a8\nrules:\n- {layers: x, scheme: float}\n"
    config = load(
        tmp_path, text,
        "scheme=w4a16-g64", "model.dtype=float32", "rules.0.layers=y", "output.dir=o",
        "output.overwrite=true",
    )  # fmt: skip
    assert str(config.scheme) == "w4a16-g64"
    assert config.model is not None
    assert (config.model.id, config.model.dtype) == ("a/b", "float32")
    assert config.rules[0].layers == "y"
    assert config.output is not None
    assert config.output.overwrite


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("scheme", "expected key=value"),
        ("=x", "expected key=value"),
        ("scheme=[a", "not YAML"),
        ("rules.3.layers=x", "index from 0 to 0"),
        ("rules.x.layers=x", "index from 0 to 0"),
        ("scheme.weights=x", "it has no keys below it"),
        ("outptu.dir=x", "did you mean 'output'?"),
    ],
)
def test_override_mistakes(tmp_path: Path, override: str, expected: str) -> None:
    text = "scheme: w8a8\nrules:\n- {layers: x, scheme: float}\n"
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, override)
    assert expected in str(error.value)


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = as_config({"scheme": "w8a8", "output": "~/out"})
    assert config.output is not None
    assert config.output.dir == "/home/somebody/out"


def test_text_sections_take_a_file_or_several() -> None:
    for given in ("a.txt", ["a.txt"], {"data": "a.txt"}):
        config = as_config({"scheme": "w8a8", "calibration": given, "evaluation": given})
        assert config.calibration is not None
        assert config.evaluation is not None
        assert config.calibration.data == config.evaluation.data == ["a.txt"]


def test_a_scheme_in_full_form_is_a_configuration() -> None:
    full = {"weights": {"format": "int4", "group_size": 64}, "activations": None}
    assert as_config(full) == as_config({"scheme": full}) == as_config("w4a16-g64")
    with pytest.raises(ConfigError, match="key 'scheme' is required.*unknown key 'weight'"):
        as_config({"weight": {}})


def test_as_config() -> None:
    assert as_config("w8a8") == as_config({"scheme": "w8a8"}) == as_config(preset("w8a8"))
    config = as_config("w8a8")
    assert as_config(config) is config
    with pytest.raises(ConfigError, match="unknown scheme"):
        as_config("nonsense")


def test_a_dumped_configuration_loads_again() -> None:
    config = as_config({"scheme": "w4a8-g64", "rules": [{"layers": "x", "scheme": "float"}]})
    assert as_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_schema_for_editors() -> None:
    schema = QuantizationConfig.model_json_schema()
    assert set(schema["properties"]) == set(QuantizationConfig.model_fields)
    assert schema["additionalProperties"] is False
