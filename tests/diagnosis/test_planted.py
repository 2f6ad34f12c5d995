"""The planted test: one layer is damaged by hand; the diagnosis names it and the cause first."""

import copy
from typing import Any

import pytest
import torch
from planted import PLANTED, Planted, inject_behind_norm, inject_outlier
from torch import Tensor, nn

from ptq.diagnosis import Diagnosis, diagnose
from ptq.pipeline import quantize
from ptq.report import Console
from tests.helpers import tiny_llama


def data(seed: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 97, (2, 24), generator=generator)} for _ in range(2)]


def planted(case: Planted, block: str, seed: int = 0) -> tuple[nn.Module, nn.Module, str]:
    """The float model, the quantized one with the damage, and the layer."""
    model, name = tiny_llama(seed=seed), f"{block}.{case.layer}"
    if case.name == "outlier channel":
        inject_outlier(model, block)
    config: dict[str, Any] = {"scheme": case.scheme}
    if case.own_scheme is not None:
        config["rules"] = [{"layers": name, "scheme": case.own_scheme}]
    quantized = copy.deepcopy(model)
    quantize(quantized, config, calibration=data(4), console=Console("quiet"))
    if case.damage is not None:
        case.damage(quantized.get_submodule(name))  # type: ignore[arg-type]
    return model, quantized, name


def named_first(case: Planted, found: Diagnosis, name: str) -> bool:
    first = found.layers[0]
    assert not any(layer.fault for layer in found.layers[1:])
    return first.layer == name and first.cause in case.causes


@pytest.mark.parametrize("block", ["model.layers.0", "model.layers.1"])
@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.name)
def test_names_the_layer_and_the_cause_first(case: Planted, block: str) -> None:
    model, quantized, name = planted(case, block)
    found = diagnose(model, data(), quantized, top=0)
    assert named_first(case, found, name), str(found)


def test_an_outlier_behind_a_norm_is_found_in_all_that_read_it() -> None:
    model = tiny_llama()
    inject_behind_norm(model, "model.layers.1")
    found = diagnose(model, data(), "w8a8", top=0)
    assert {x.layer for x in found.layers[:2]} == {
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }
    for layer in found.layers[:2]:
        assert layer.cause == "outlier_channels"
        assert layer.outlier_channels[0].index == 5
        assert layer.kl_activations > 5 * layer.kl_weights


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w4a16-g16-asym", "w3a16", "w2a16-g16-asym", "w8a8-static", "fp8", "w4a16"]
)
def test_finds_no_fault_where_there_is_none(scheme: str) -> None:
    found = diagnose(tiny_llama(), data(), scheme, top=0, calibration=data())
    sound = {"weight_rounding", "input_rounding"}
    assert {layer.cause for layer in found.layers} <= sound, str(found)


def test_compensated_errors_are_no_fault() -> None:
    for recipe in ("gptaq", "gptq", "hqq", {"name": "rtn", "options": {"clip": True}}):
        config = {"scheme": "w4a16-g16-asym", "recipe": [recipe]}
        found = diagnose(tiny_llama(), data(), config, top=0, calibration=data(5))
        assert {layer.cause for layer in found.layers} == {"weight_rounding"}, str(found)


def test_the_remedy_of_a_damaged_layer_is_to_quantize_it_anew() -> None:
    case = next(c for c in PLANTED if c.name == "groups permuted")
    model, quantized, name = planted(case, "model.layers.0")
    found = diagnose(model, data(), quantized, top=1)
    anew = next(r for r in found.remedies if r.remedy == "quantize it anew")
    assert anew.layer == name and anew.bytes == 0
    assert anew.kl_before == found.layers[0].kl
    assert anew.kl_after < 0.05 * anew.kl_before
