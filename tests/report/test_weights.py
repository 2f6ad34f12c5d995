"""Errors and histograms of weights, against the weights themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.config import as_config
from ptq.model import load_float
from ptq.pipeline import run
from ptq.report import Console, Report, WeightRecorder, block_and_kind
from tests.helpers import quant_linear


def quantized(scheme: str, rows: int = 24, columns: int = 64) -> tuple[Tensor, ptq.QuantLinear]:
    torch.manual_seed(3)
    linear = nn.Linear(columns, rows)
    return linear.weight.detach(), quant_linear(linear, ptq.config.preset(scheme))


def sorted_by(layer: ptq.QuantLinear, weight: Tensor) -> Tensor:
    """Let the layer's codes be for another order of the inputs; the float weight that goes with
    them."""
    order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(4))
    layer.scheme = layer.scheme.model_copy(update={"input_order": True})
    layer.input_order = order.to(torch.int32)
    found = torch.empty_like(weight)
    found[:, order] = weight
    return found


def test_the_error_of_codes_in_another_order() -> None:
    weight, layer = quantized("w4a16-g32")
    recorders = WeightRecorder(), WeightRecorder()
    recorders[0].see("a", weight, layer.quantized_weight)
    weight = sorted_by(layer, weight)
    recorders[1].see("a", weight, layer.quantized_weight)
    assert recorders[0].to_dict() == recorders[1].to_dict()


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a8", "w2a16", "w8a16-tensor"])
def test_the_error_is_that_of_the_float_weight(scheme: str) -> None:
    weight, layer = quantized(scheme)
    recorder = WeightRecorder()
    recorder.see("a", weight, layer.quantized_weight)
    made = recorder.layers["a"]
    before, after = weight.double().numpy(), layer.weight.double().numpy()
    relative = ((after - before) ** 2).sum() / (before**2).sum()
    assert made["relative_squared_error"] == pytest.approx(relative, rel=1e-5)
    assert made["sqnr_db"] == pytest.approx(10 * np.log10(1 / relative), abs=1e-4)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w8a8", "w2a16", "w8a16-tensor"])
def test_histograms_against_numpy(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq.report.weights._ELEMENTS", 300)  # four rows at a time, and a rest
    weight, layer = quantized(scheme, rows=23)
    recorder = WeightRecorder()
    recorder.see("a", weight, layer.quantized_weight)
    found = recorder.histograms["a"]
    codes = layer.quantized_weight.codes.numpy()
    bits = layer.quantized_weight.format.bits
    assert (found["low"], found["high"]) == (-(2 ** (bits - 1)) - 0.5, 2 ** (bits - 1) - 0.5)
    edges = np.linspace(found["low"], found["high"], min(64, 2**bits) + 1)
    assert found["after"] == np.histogram(codes, edges)[0].tolist()
    # In steps: what a weight is beside what its code stands for, half a step off at most.
    scale = layer.scale.numpy().repeat(64 // layer.scale.shape[1], axis=1)
    error = (weight - layer.weight).numpy() / scale
    edges = np.linspace(found["low"], found["high"], 65)
    inside = np.clip(codes + error, found["low"] + 1e-6, found["high"] - 1e-6)
    expected = np.histogram(inside, edges)[0]
    assert np.abs(np.array(found["before"]) - expected).sum() <= 4  # rounding, at an edge
    assert sum(found["before"]) == weight.numel()


def test_what_is_beyond_the_grid_is_counted() -> None:
    weight, layer = quantized("w4a16")
    recorder = WeightRecorder()
    recorder.see("a", weight * 2, layer.quantized_weight)
    steps = (2 * weight / layer.scale).numpy()
    assert recorder.histograms["a"]["clipped"] == ((steps < -8.5) | (steps > 7.5)).sum() > 50
    assert sum(recorder.histograms["a"]["before"]) == weight.numel()


def test_weights_that_are_exact_or_nothing() -> None:
    weight, layer = quantized("w4a16")
    recorder = WeightRecorder()
    recorder.see("exact", layer.weight, layer.quantized_weight)
    recorder.see("nothing", torch.zeros_like(weight), layer.quantized_weight)
    assert recorder.layers["exact"] == {"relative_squared_error": 0.0, "sqnr_db": None}
    assert recorder.layers["nothing"] == {"relative_squared_error": None, "sqnr_db": None}


def test_float8() -> None:
    weight, layer = quantized("fp8")
    recorder = WeightRecorder()
    recorder.see("a", weight, layer.quantized_weight)
    assert recorder.histograms["a"]["low"] == -448
    assert sum(recorder.histograms["a"]["after"]) == weight.numel()
    assert recorder.layers["a"]["sqnr_db"] > 25


def test_the_report_keeps_few_histograms() -> None:
    recorder = WeightRecorder()
    weight, layer = quantized("w4a16")
    for block in range(10):
        for kind, off in (("q_proj", 1.0), ("up_proj", 1.1)):
            recorder.see(f"h.{block}.{kind}", weight * (off + block / 100), layer.quantized_weight)
    found = recorder.to_dict(most=4)
    assert len(found["layers"]) == 20
    names = [seen["name"] for seen in found["histograms"]]
    # Of each kind the worst, then the worst that are left.
    assert names == ["h.9.up_proj", "h.9.q_proj", "h.8.up_proj", "h.7.up_proj"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers", 3, "self_attn.q_proj")),
        ("h.11.mlp.experts.7.up_proj", ("h", 11, "mlp.experts.*.up_proj")),
        ("decoder.block.0.layer.1.q", ("decoder.block", 0, "layer.*.q")),
        ("0.1", ("", 0, "1")),
        ("lm_head", ("", None, "lm_head")),
        ("0", ("", None, "0")),
    ],
)
def test_where_a_layer_is(name: str, expected: tuple[str, int | None, str]) -> None:
    assert block_and_kind(name) == expected


def finished(tmp_path: Path, model: Path, text: Path, **changes: object) -> Report:
    config = {
        "model": str(model), "scheme": "w4a16-g32", "output": str(tmp_path / "out"),
        "calibration": {"data": str(text), "samples": 2, "sequence_length": 24}, **changes,
    }  # fmt: skip
    return run(as_config(config), console=Console("quiet"))


@pytest.mark.parametrize(
    "recipe",
    [
        ["rtn"],
        ["gptq"],
        ["gptq", {"name": "learned_rounding", "options": {"iterations": 40}}],
        ["gptq", {"name": "distill", "options": {"epochs": 1}}],
    ],
    ids=["plain", "blockwise", "refined", "distilled"],
)
def test_a_run_records_what_it_saved(
    recipe: list[object], tmp_path: Path, tiny_model: Path, tiny_texts: tuple[Path, Path]
) -> None:
    """Against the weights of the float model, and those of the checkpoint that was written."""
    report = finished(tmp_path, tiny_model, tiny_texts[0], recipe=recipe, embeddings="w8a16")
    before, after = load_float(str(tiny_model))[0], ptq.dequantize(ptq.load(tmp_path / "out"))
    rows = report.sections["weights"]["layers"]
    assert len(rows) == 2 * 7 + 1
    for row in rows:
        old = before.get_submodule(row["name"]).weight.detach().double()
        new = after.get_submodule(row["name"]).weight.detach().double()
        relative = ((new - old).square().sum() / old.square().sum()).item()
        assert row["relative_squared_error"] == pytest.approx(relative, rel=1e-3), row["name"]
