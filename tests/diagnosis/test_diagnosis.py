"""The figures of a diagnosis against plain computations; its output; what it refuses."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.diagnosis import Diagnosis, diagnose
from ptq.errors import CalibrationError, ConfigError, ModelError, UnsupportedError
from ptq.pipeline import quantize
from ptq.planning import plan
from ptq.report import Console
from ptq.sensitivity import exact_divergence
from tests.helpers import tiny_bert, tiny_llama
from tests.tiny import tiny_text, tiny_tokenizer

DOWN = "model.layers.1.mlp.down_proj"


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 97, (2, 24), generator=generator)} for _ in range(2)]


def inputs_of_layer(model: nn.Module, name: str) -> Tensor:
    """All rows that the layer reads, float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, 1).double())
    )
    for batch in data():
        model(**batch)
    handle.remove()
    return torch.cat(seen)


def quantized_copy(model: nn.Module, scheme: Any) -> nn.Module:
    made = copy.deepcopy(model)
    quantize(made, scheme, calibration=data(), console=Console("quiet"))
    return made


def decibels(exact: Tensor, made: Tensor) -> float:
    return 10 * (exact.square().sum() / (made - exact).square().sum()).log10().item()


@torch.no_grad()
def test_the_figures_of_a_layer() -> None:
    model = tiny_llama()
    quantized = quantized_copy(model, "w4a8-g16")
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = diagnose(model, data(), quantized, top=0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [x.kl for x in found.layers] == sorted((x.kl for x in found.layers), reverse=True)
    assert found.sum_of_layers == pytest.approx(sum(x.kl for x in found.layers))

    layer = next(x for x in found.layers if x.layer == DOWN)
    scheme = quantized.get_submodule(DOWN).scheme
    exact = {f.part: f.kl for f in exact_divergence(model, data(), {DOWN: scheme})}
    assert layer.kl == pytest.approx(exact["both"])
    assert layer.kl_weights == pytest.approx(exact["weights"])
    assert layer.kl_activations == pytest.approx(exact["activations"])

    x, w = inputs_of_layer(model, DOWN), model.get_submodule(DOWN).weight.double()
    step = x.abs().amax(-1, keepdim=True) / 127
    read, stored = (x / step).round() * step, quantized.get_submodule(DOWN).weight.double()
    assert layer.sqnr_inputs_db == pytest.approx(decibels(x, read), abs=0.01)
    assert layer.sqnr_weights_db == pytest.approx(decibels(w, stored), abs=0.01)
    assert layer.sqnr_outputs_db == pytest.approx(decibels(x @ w.T, read @ stored.T), abs=0.01)

    kl = [
        torch.nn.functional.kl_div(
            quantized(**b).logits[:, :-1].double().log_softmax(-1),
            model(**b).logits[:, :-1].double().softmax(-1),
            reduction="none",
        ).sum(-1)
        for b in data()
    ]
    assert found.whole_kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-3)


@torch.no_grad()
def test_saturation_is_told_from_rounding() -> None:
    """A static range of half the inputs: the clipped inputs alone, unrounded, do ``clipping``."""
    model = tiny_llama()
    quantized = quantized_copy(model, "w8a8-static")
    layer = quantized.get_submodule(DOWN)
    layer.input_scale = layer.input_scale * 0.3
    layer.release()
    found = diagnose(model, data(), quantized, layers=DOWN, top=0).layers[0]
    end = layer.input_scale.item() * 127
    x = inputs_of_layer(model, DOWN)
    beyond = (x > end * 127.5 / 127) | (x < -end * 128.5 / 127)
    assert found.saturated_inputs == pytest.approx(beyond.double().mean().item())
    assert found.range_used == pytest.approx(
        max(x.max() / end, -x.min() / (end * 128 / 127)).item()
    )
    clipped = copy.deepcopy(model)
    clipped.get_submodule(DOWN).register_forward_pre_hook(
        lambda _, args: (args[0].clamp(-end * 128 / 127, end),)
    )
    p, q = (
        torch.cat([m(**b).logits[:, :-1].double().log_softmax(-1).flatten(0, 1) for b in data()])
        for m in (model, clipped)
    )
    assert found.kl_clipping == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.01)
    assert found.kl_clipping < found.kl_activations < 1.5 * found.kl_clipping


@torch.no_grad()
def test_remedies_are_measured() -> None:
    model = tiny_llama()
    found = diagnose(model, data(), "w4a8-g32", top=1)
    worst = found.layers[0].layer
    remedies = {r.remedy: r for r in found.remedies}
    assert {r.layer for r in found.remedies} == {worst}
    assert all(r.kl_before == found.layers[0].kl for r in found.remedies)
    after = [r.kl_after for r in found.remedies]
    assert after == sorted(after)
    sizes = {
        name: next(x.bytes_after for x in plan(model, name).layers if x.name == worst)
        for name in ("w4a8-g32", "w4a8-g16", "w4a8-g32-asym", "w8a8")
    }
    for remedy, scheme in (
        ("groups of 16", "w4a8-g16"),
        ("asymmetric weights", "w4a8-g32-asym"),
        ("int8 weights", "w8a8"),
    ):
        [exact] = exact_divergence(
            model, data(), {worst: ptq.config.preset(scheme)}, parts=["both"]
        )
        assert remedies[remedy].scheme == scheme
        assert remedies[remedy].kl_after == pytest.approx(exact.kl)
        assert remedies[remedy].bytes == sizes[scheme] - sizes["w4a8-g32"]
    assert remedies["quantize it anew"].kl_after == pytest.approx(found.layers[0].kl)
    kept = remedies["keep it in float"]
    weight = model.get_submodule(worst).weight
    assert (kept.kl_after, kept.bytes) == (0, weight.numel() * 4 - sizes["w4a8-g32"])
    assert {"recipe: gptq", "recipe: smoothquant", "recipe: rotation"} <= remedies.keys()


def test_a_static_range_is_remedied() -> None:
    model = tiny_llama()
    quantized = quantized_copy(model, "w8a8-static")
    layer = quantized.get_submodule(DOWN)
    layer.input_scale = layer.input_scale * 0.1
    layer.release()
    found = diagnose(model, data(), quantized, top=1)
    remedies = {r.remedy: r for r in found.remedies}
    for name in ("dynamic activations", "quantize it anew", "static range by least squared error"):
        assert remedies[name].layer == DOWN
        assert remedies[name].kl_after < 0.05 * found.layers[0].kl


@torch.no_grad()
def test_outlier_tokens_are_shown_in_their_text() -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight[40] *= 1000
    ids = torch.full((1, 12), 7)
    ids[0, 5] = 40
    batches = [{"input_ids": torch.full((1, 12), 9)}, {"input_ids": ids}]
    found = diagnose(model, batches, "w8a8", tokenizer=tiny_tokenizer(), top=0)
    [token] = found.tokens
    assert (token.window, token.position, token.id, token.text) == (1, 5, 40, "w38")
    assert token.ratio > 100
    hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, 5]
    assert token.block == "model.layers.0"
    assert token.channel == hidden.abs().argmax()
    assert token.magnitude == pytest.approx(hidden.abs().max().item(), rel=1e-4)


def test_padding_is_no_outlier() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= 1000
    ids, mask = torch.full((1, 12), 7), torch.ones(1, 12, dtype=torch.int64)
    ids[0, 9:], mask[0, 9:] = 0, 0
    found = diagnose(model, [{"input_ids": ids, "attention_mask": mask}], "w8a8", top=0)
    assert found.tokens == ()


def test_an_encoder() -> None:
    found = diagnose(tiny_bert(), data(), "w4a16", top=1)
    assert found.measure == "output_error"
    assert len(found.layers) == 13 and found.layers[0].kl > 0
    assert "relative output error" in str(found)


def test_the_table_and_the_file(tmp_path: Path) -> None:
    found = diagnose(tiny_llama(), data(), "w8a8", layers="*.1.mlp.*", top=1)
    assert len(found.layers) == 3
    written = json.loads(found.write(tmp_path).read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert [p.name for p in tmp_path.iterdir()] == ["diagnosis.json"]
    assert {
        "layer", "kl", "kl_weights", "kl_activations", "kl_clipping", "sqnr_weights_db",
        "sqnr_inputs_db", "sqnr_outputs_db", "outlier_channels", "cause",
    } <= written["layers"][0].keys()  # fmt: skip
    assert {"layer", "remedy", "kl_before", "kl_after", "bytes"} <= written["remedies"][0].keys()
    for text in (str(found), found._repr_html_()):
        assert all(layer.layer in text for layer in found.layers)
        assert "which are 3 of 14" in text
        assert f"{found.whole_kl:.4g}" in text and "keep it in float" in text
    assert found._repr_html_().count("</table>") == 2


def test_bad_input() -> None:
    model = tiny_llama()
    quantized = quantized_copy(model, "w8a8")
    with pytest.raises(ConfigError, match="'lm_heat' matches none of the 14 quantized layers"):
        diagnose(model, data(), quantized, layers="lm_heat")
    with pytest.raises(UnsupportedError, match="has no quantized linear layer"):
        diagnose(model, data(), tiny_llama())
    with pytest.raises(ModelError, match=r"q_proj \[32, 32\] is quantized, the float"):
        diagnose(tiny_bert(), data(), quantized)
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        diagnose(model, "text.txt", quantized)
    with pytest.raises(CalibrationError, match="need calibration data"):
        diagnose(model, data(), "w8a8-static")


def test_text_needs_a_tokenizer_and_gives_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(200))
    found: Diagnosis = ptq.diagnose(
        tiny_llama(), path, "w4a16", tokenizer=tiny_tokenizer(), windows=3, context=16, top=0
    )
    assert found.scored == 3 * 15
