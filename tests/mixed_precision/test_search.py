"""The whole search on a tiny model: the file, the bytes, the proof."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import bench_sensitivity
import pytest
import search as script
import torch

import ptq
from ptq.config import Plugin, QuantizationConfig, as_config, load_config, preset
from ptq.errors import CalibrationError, ConfigError, UnsupportedError
from ptq.mixed_precision.choices import make_space
from ptq.mixed_precision.configure import configure
from ptq.mixed_precision.proof import within_bound
from ptq.mixed_precision.result import Measured
from tests.tiny import tiny_model_directory, tiny_text

SCHEMES = ["w3a16-g16-asym", "w4a16-g16-asym", "w8a16", "float"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Iterator[Path]:
    """A recipe for a tiny model, in a directory with its texts."""
    directory = tmp_path_factory.mktemp("search")
    tiny_model_directory(directory / "model", seed=3)
    (directory / "calibration.txt").write_text(tiny_text(300, 1))
    (directory / "evaluation.txt").write_text(tiny_text(200, 2))
    (directory / "recipe.yaml").write_text(
        f"model: {directory}/model\n"
        "scheme: w4a16-g16-asym\n"
        "rules: [{layers: model.layers.1.mlp.down_proj, scheme: w8a16}]\n"
        f"calibration: {{data: {directory}/calibration.txt, samples: 3, sequence_length: 64}}\n"
        f"evaluation: {{data: {directory}/evaluation.txt, windows: 2, context: 64}}\n"
        f"output: {{dir: {directory}/out, dtype: bfloat16}}\n"
    )
    return directory / "recipe.yaml"


@pytest.fixture(scope="module")
def loaded(recipe: Path):
    config = load_config(recipe)
    assert config.model is not None
    return (*ptq.load_float(config.model.id), config)


def test_the_script_writes_a_recipe_that_runs(recipe: Path, capsys) -> None:
    """Searched twice from kept predictions, then quantized: bytes and figures are those said."""
    out, figures = recipe.with_name("mixed.yaml"), recipe.with_name("search.json")
    arguments = ["--config", str(recipe), "--budget", "6 bits", "--output",
                 str(out), "--schemes", *SCHEMES, "--json", str(figures),
                 "--sensitivity", str(recipe.with_name("kept")),
                 "--against", "w4a16-g16-asym"]  # fmt: skip
    assert script.main(arguments) == 0
    first = out.read_text()
    assert script.main(arguments) == 0, capsys.readouterr().err
    assert out.read_text() == first
    found = json.loads(figures.read_text())
    mine = found["measured"][0]
    names = [m["name"] for m in found["measured"]]
    assert {"searched", "uniform w4a16-g16-asym"} <= set(names)
    assert found["chosen"]["bytes"] == mine["bytes"] and found["chosen"]["bits"] <= 6
    distances = [abs(math.log(m["ratio"])) for m in found["measured"]]
    assert distances[0] == min(distances)
    assert first.count("# measured: ") == 1 and first.count("# others: ") == len(names) - 1
    points = found["points"]
    assert [p["bytes"] for p in points] == sorted(p["bytes"] for p in points)
    assert [p["kl"] for p in points] == sorted((p["kl"] for p in points), reverse=True)
    assert sum(layer["kl"] for layer in found["layers"]) <= found["chosen"]["kl"] + 1e-9
    config = load_config(out)
    assert config.rules[-1] == load_config(recipe).rules[0]
    report = ptq.run(config, console=ptq.report.Console("quiet"))
    assert report.sections["checkpoint"]["tensor_bytes"] == mine["bytes"]
    evaluation = report.sections["evaluation"]
    assert evaluation["ratio"] == pytest.approx(mine["ratio"], rel=1e-6)
    assert evaluation["kl_mean"] == pytest.approx(mine["kl"], rel=1e-6)
    for line in first.splitlines():
        assert not line.startswith("  - ") or "# " in first


@pytest.mark.parametrize("act_order", ["static", "permuted"])
def test_choices_and_bytes(loaded, act_order: str) -> None:
    """Bytes of every option are those of the model quantized like that."""
    model, _, config = loaded
    recipe = [{"name": "gptq", "options": {"act_order": act_order}}]
    config = as_config({**config.model_dump(), "recipe": recipe})
    schemes = [preset("w3a16-g16-asym"), preset("w8a16"), preset("w4a16-g64"), None]
    space = make_space(model, config, schemes, dtype=torch.bfloat16)
    groups = [choice.layers for choice in space.choices]
    block = "model.layers.0"
    assert groups[0] == tuple(f"{block}.self_attn.{p}_proj" for p in "qkv")
    assert groups[2] == (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
    assert not any("model.layers.1.mlp.down_proj" in group for group in groups)
    assert space.fixed == {"model.layers.1.mlp.down_proj": preset("w8a16")}
    names = [option.name for option in space.choices[0].options]
    assert names == ["w3a16-g16-asym", "w8a16", "float"]  # groups of 64 do not divide 32
    for index, scheme in ((0, "w3a16-g16-asym"), (1, "w8a16")):
        whole = sum(choice.options[index].bytes for choice in space.choices)
        uniform = as_config({**config.model_dump(), "scheme": scheme})
        plan = ptq.plan(model, uniform, dtype=torch.bfloat16)
        assert whole + space.fixed_bytes == plan.bytes_after
    alone = make_space(model, config, schemes, fuse=False)
    assert all(len(choice.layers) == 1 for choice in alone.choices)


def test_pinned_layers_win(loaded) -> None:
    """The user's rule comes after the searched ones, and the plan has all that was chosen."""
    model, _, config = loaded
    space = make_space(model, config, [preset("w3a16-g16-asym"), preset("w8a16")])
    chosen = [
        (choice, choice.options[0 if "mlp" in choice.layers[0] else 1]) for choice in space.choices
    ]
    made, written = configure(model, config, chosen)
    assert len(written) > 0 and made.rules[len(written) :] == config.rules
    schemes = ptq.plan(model, made).schemes
    assert schemes.pop("model.layers.1.mlp.down_proj") == preset("w8a16")
    assert schemes == {name: option.scheme for c, option in chosen for name in c.layers}


@pytest.mark.parametrize("tied", ["keep", "untie"])
def test_embedding_and_head_take_part_where_allowed(loaded, tied: str) -> None:
    model, tokenizer, config = loaded
    config = QuantizationConfig.model_validate({**config.model_dump(), "tied_embeddings": tied})
    most = "0.0262 MB" if tied == "keep" else "0.03 MB"
    found = ptq.search(
        model, most, config=config, tokenizer=tokenizer, schemes=SCHEMES, ends=["w8a16"],
        verify=False, draws=1,
    )  # fmt: skip
    plan = ptq.plan(model, found.config, dtype=torch.bfloat16)
    assert found.config.embeddings == preset("w8a16")
    assert plan.bytes_after == found.chosen.bytes
    assert plan.sharing == ({"lm_head": "model.embed_tokens"} if tied == "keep" else {})
    assert ("lm_head" in plan.schemes) == (tied == "untie")
    layers = {layer.name: layer for layer in plan.layers}
    for layer in found.layers:
        assert layer.scheme == str(layers[layer.layer].scheme or "float")


def test_time_is_a_budget(loaded, monkeypatch) -> None:
    """Made-up times: 3 bits are slow, so only what is at least as fast as w8a16 is left."""
    model, tokenizer, config = loaded

    def times(shapes, schemes, **_):
        return {(shape, s): 5.0 if str(s).startswith("w3") else 1.0
                for shape in shapes.values() for s in schemes}  # fmt: skip

    monkeypatch.setattr("ptq.mixed_precision.run.layer_times", times)
    found = ptq.search(
        model, ["as fast as w8a16", "5.6 bits"], config=config, tokenizer=tokenizer, verify=False,
        schemes=SCHEMES, draws=1,
    )  # fmt: skip
    assert found.milliseconds == 13
    assert {layer.scheme for layer in found.layers} == {"w4a16-g16-asym"}
    with pytest.raises(ConfigError, match="cannot be met together with '4.6 bits'"):
        ptq.search(model, ["4.6 bits", "as fast as w8a16"], config=config, tokenizer=tokenizer,
                   verify=False, schemes=SCHEMES)  # fmt: skip


def test_real_times(monkeypatch, tmp_path) -> None:
    from ptq.mixed_precision.timing import layer_times

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = layer_times(
        {"a": (32, 64), "b": (32, 64)}, [preset("w8a16"), None, preset("w4a16-g128")],
        rows=1, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    assert found.keys() == {((32, 64), preset("w8a16")), ((32, 64), None)}
    assert all(time > 0 for time in found.values())


@pytest.mark.parametrize(
    ("budget", "options", "kind", "words"),
    [
        ("1 KB", {}, ConfigError, "'1 KB' cannot be met: the candidates give 0.0"),
        ("4 bits", {}, ConfigError, "give 4.5 bits to 16 bits, 4 bits are asked"),
        ("5 bits", {"schemes": ["w4"]}, ConfigError, "candidates: unknown scheme 'w4'"),
        ("5 bits", {"schemes": ["w4a16-g64"]}, ConfigError, "none of the candidates w4a16-g64 fit"),
        ("5 bits", {"against": ["w4"]}, ConfigError, "candidates: unknown scheme 'w4'"),
        ("5 bits", {"against": ["float"]}, ConfigError, "against: everything is compared"),
        ("5 bits", {"ends": ["w8a8"]}, ConfigError, "ends: w8a8 has quantized activations"),
        ("16 bits", {"rules": []}, ConfigError, "every layer in float"),
        ("5 bits", {"tokenizer": None}, CalibrationError, "tokenizer"),
    ],
)  # fmt: skip
def test_refusals(loaded, budget: str, options, kind, words: str) -> None:
    model, tokenizer, config = loaded
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = config.model_copy(update={"rules": options.pop("rules", config.rules)})
    given = {"schemes": SCHEMES, "tokenizer": tokenizer, "draws": 1, **options}
    with pytest.raises(kind, match=words):
        ptq.search(model, budget, config=config, verify=False, **given)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_text_is_needed(loaded) -> None:
    model, tokenizer, config = loaded
    bare = config.model_copy(update={"calibration": None})
    with pytest.raises(CalibrationError, match="needs text to predict"):
        ptq.search(model, "5 bits", config=bare, tokenizer=tokenizer, schemes=SCHEMES)
    bare = config.model_copy(update={"evaluation": None})
    with pytest.raises(CalibrationError, match="measuring needs text"):
        ptq.search(model, "5 bits", config=bare, tokenizer=tokenizer, schemes=SCHEMES)
    same = config.model_copy(update={"evaluation": None})
    same = QuantizationConfig.model_validate(
        {**same.model_dump(), "evaluation": {"data": config.calibration.data, "context": 64}}
    )
    with pytest.raises(CalibrationError, match="of the evaluation text is in the text"):
        ptq.search(model, "5 bits", config=same, tokenizer=tokenizer, schemes=SCHEMES)


class Stand:
    """In place of the proof: ratios by what a plan has."""

    def __init__(self, ratio) -> None:
        self.ratio, self.asked = ratio, []

    def __call__(self, _, name, config, predicted_kl=None) -> Measured:
        self.asked.append(name)
        return Measured(name, 0, 0.1, self.ratio(name), 0.9, 1.3, predicted_kl, 1)


def searched(loaded, monkeypatch, budget, ratio, **options):
    model, tokenizer, config = loaded
    stand = Stand(ratio)
    monkeypatch.setattr("ptq.mixed_precision.proof.Prover.measure", lambda *a: stand(*a))
    given = {"schemes": SCHEMES, "draws": 1, "ends": (), **options}
    found = ptq.search(model, budget, config=config, tokenizer=tokenizer, **given)
    return found, stand.asked


def test_what_measures_best_is_taken(loaded, monkeypatch) -> None:
    """Whatever was predicted; 0.97 is as far from 1 as about 1.03."""
    ratios = {"searched": 1.2, "searched without 3 bits": 0.95, "uniform w4a16-g16-asym": 1.04}
    found, asked = searched(loaded, monkeypatch, "6 bits", ratios.get)
    assert sorted(asked) == sorted(ratios)
    assert {layer.scheme for layer in found.layers} == {"w4a16-g16-asym"}
    assert [m.name for m in found.measured] == [
        "uniform w4a16-g16-asym", "searched", "searched without 3 bits",
    ]  # fmt: skip
    ratios["searched"] = 1.0
    found, _ = searched(loaded, monkeypatch, "6 bits", ratios.get)
    assert len({layer.scheme for layer in found.layers}) > 1 and found.measured[0].ratio == 1


@pytest.mark.parametrize(
    ("budget", "even"),
    [
        ("6 bits", "w4a16-g16-asym"),  # 8 and more are too many, 3 are worse
        ("12 bits", "w8a16"),
        ("as small as w3a16-g16-asym", "w3a16-g16-asym"),
    ],
)
def test_a_uniform_scheme_is_always_tried(loaded, monkeypatch, budget: str, even: str) -> None:
    """Also where one trial is asked for; with 3 bits for all there is nothing else."""
    found, asked = searched(loaded, monkeypatch, budget, lambda _: 1.1, trials=1)
    assert found.chosen.kl > 0
    if "w3" in budget:
        assert {layer.scheme for layer in found.layers} == {even}
    else:
        assert asked == [f"uniform {even}", "searched"]


@pytest.mark.parametrize("plain", [True, False])
def test_the_texts_loss_counts_where_the_codes_are_known(loaded, monkeypatch, plain: bool) -> None:
    """Slopes that turn the order of schemes around, but for a recipe whose codes are others."""
    monkeypatch.setattr("ptq.sensitivity.fisher.Prediction.slope", fewer_bits_help)
    model, tokenizer, config = loaded
    steps = [Plugin(name="rtn" if plain else "gptq")]
    config = config.model_copy(update={"recipe": steps})
    _, asked = searched((model, tokenizer, config), monkeypatch, "6 bits", lambda _: 1.1)
    assert ("searched for the text's loss" in asked) == plain


def fewer_bits_help(_, changes) -> float:
    """A slope that only 3 bits have, as large as makes up for their divergence."""
    bits = [s.weights.number_format.bits for s in changes.values() if s is not None]
    return -0.01 * sum(b == 3 for b in bits)


def test_the_scheme_that_a_budget_names_is_tried(loaded, monkeypatch) -> None:
    """A worse one than another that fits as well; by default it is a candidate."""
    budget = "as small as w4a16-g16"
    options = {"schemes": ["w3a16-g16-asym", "w4a16-g16", "w4a16-g32-asym"]}
    _, asked = searched(loaded, monkeypatch, budget, lambda _: 1.1, **options)
    assert "uniform w4a16-g16" in asked
    model, tokenizer, config = loaded
    config = config.model_copy(update={"scheme": preset("w4a16-g64-asym")})  # fits no layer
    found = ptq.search(model, "as small as w8a8", config=config, tokenizer=tokenizer,
                       verify=False, draws=1, schemes=())  # fmt: skip
    assert "w8a8" in {layer.scheme for layer in found.layers}


def test_a_smaller_uniform_scheme_within_the_bound_wins(loaded, monkeypatch) -> None:
    """Where its divergence is not hopeless; it is smaller than the mixed one, and does as well."""
    even = "uniform w4a16-g16-asym"
    for worth, expected in ((1e9, True), (0.0, False)):
        monkeypatch.setattr("ptq.mixed_precision.run._WORTH", worth)
        found, asked = searched(
            loaded, monkeypatch, "0.0002% perplexity",
            lambda name: 1.2 if "w3" in name else 1.0, trials=1,
        )  # fmt: skip
        assert (even in asked) == expected
        assert ({layer.scheme for layer in found.layers} == {"w4a16-g16-asym"}) == expected


def test_static_activations_take_part(loaded, tmp_path) -> None:
    """Predicted as what they are, kept with the observer, timed, and within the bytes."""
    model, tokenizer, config = loaded
    kept = tmp_path / "kept"
    given = {"schemes": ["w8a8-static", "w4a16-g16-asym"], "draws": 1, "sensitivity": kept}
    found = ptq.search(model, "7 bits", config=config, tokenizer=tokenizer, verify=False, **given)
    schemes = {layer.scheme for layer in found.layers}
    assert schemes == {"w8a8-static", "w4a16-g16-asym"}
    assert found.chosen.bytes == ptq.plan(model, found.config, dtype=torch.bfloat16).bytes_after
    other = config.calibration.model_copy(update={"observer": Plugin(name="percentile")})
    other = QuantizationConfig.model_validate(
        {**config.model_dump(), "calibration": other.model_dump()}
    )
    with pytest.raises(CalibrationError, match="other codes"):
        ptq.search(model, "7 bits", config=other, tokenizer=tokenizer, verify=False, **given)


@pytest.mark.parametrize(
    ("budget", "ends", "expected"),
    [
        ("as small as w4a16-g16-asym", {}, "w8a16"),
        ("as small as w4a16-g16-asym", {"ends": ["float"]}, "None"),
        ("6 bits", {}, "None"),
        (["1 MB", "9 bits"], {}, "None"),
    ],
)
def test_the_embedding_takes_part_by_default(loaded, budget, ends, expected: str) -> None:
    """Where the budget is of the whole checkpoint."""
    model, tokenizer, config = loaded
    given = {"config": config, "tokenizer": tokenizer, "verify": False, "draws": 1}
    found = ptq.search(model, budget, schemes=SCHEMES, **given, **ends)
    assert str(found.config.embeddings) == expected
    if expected != "None":
        given["config"] = config.model_copy(update={"embeddings": preset("w8a16")})
        kept = ptq.search(model, "0.03 MB", schemes=SCHEMES, **given, **ends)
        assert kept.config.embeddings == preset("w8a16")
        assert all("embed" not in layer.layer for layer in kept.layers)


def test_kept_predictions_are_of_the_codes(loaded, tmp_path) -> None:
    """Those of round to nearest are not taken for those with searched ranges."""
    model, tokenizer, config = loaded
    given = {"tokenizer": tokenizer, "schemes": SCHEMES, "draws": 1, "verify": False,
             "sensitivity": tmp_path / "kept"}  # fmt: skip
    ptq.search(model, "6 bits", config=config, **given)
    clipped = Plugin(name="rtn", options={"clip": True})
    other = config.model_copy(update={"recipe": [clipped]})
    with pytest.raises(CalibrationError, match="other codes"):
        ptq.search(model, "6 bits", config=other, **given)


@pytest.mark.parametrize("slope", [0.2, 1.0, 6.0])
def test_the_bound_on_perplexity_is_found(slope: float) -> None:
    """A model whose loss rises as slope * KL^1.1, and shrinks as KL rises."""

    def attempt(kl: float) -> tuple[list[int], Measured]:
        step = round(kl * 5000) / 5000 + 1e-5
        ratio = 2.718281828 ** (slope * step**1.1)
        return [int(1e6 * step)], Measured("", int(1e6 * (1 - step)), step, ratio, 0, 0, step, 1)

    chosen, measured = within_bound(1.0, 8, attempt)
    best = [m for m in measured if m.ratio <= 1.01]
    assert min(m.bytes for m in best) == next(m.bytes for m in best if [int(1e6 * m.kl)] == chosen)
    assert max(m.ratio for m in best) > 1.008


def test_a_bound_that_no_trial_keeps() -> None:
    def attempt(kl: float) -> tuple[list[int], Measured]:
        return [1], Measured("", 10**6, 0.5, 1.5, 1.4, 1.6, kl, 1)

    with pytest.raises(
        UnsupportedError, match=r"none of 1 configurations .* nearest: 1.5000 at 1.0 MB"
    ):
        within_bound(1.0, 3, attempt)


def test_prediction_and_exact_agree_on_the_ranking(recipe: Path, capsys) -> None:
    """As scripts/bench_sensitivity.py measures it, on the tiny model."""
    figures = recipe.with_name("sensitivity.json")
    texts = ["--model", str(recipe.with_name("model")), "--data",
             str(recipe.with_name("calibration.txt")), "--json", str(figures)]  # fmt: skip
    sizes = ["--windows", "4", "--exact-windows", "4", "--context", "64"]
    schemes = ["--schemes", "w4a16-g16-asym", "w8a8"]
    assert bench_sensitivity.main([*texts, *sizes, *schemes]) == 0
    rows = json.loads(figures.read_text())
    assert len(rows) == 28
    logs = torch.tensor([[row["exact"], row["predicted"]] for row in rows]).log()
    assert torch.corrcoef(logs.T)[0, 1] > 0.9
    assert (logs[:, 0] - logs[:, 1]).mean().abs() < 0.5  # and the size is right
    assert capsys.readouterr().out.count("Spearman") == 2
