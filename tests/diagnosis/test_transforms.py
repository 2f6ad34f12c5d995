"""Recipes that rescale what layers read: no fault is found in what they did, but one in damage."""

import copy
from typing import Any

import pytest
import torch
from planted import inject_behind_norm, permuted_groups, scaled
from torch import Tensor, nn

from ptq.diagnosis import diagnose
from ptq.pipeline import quantize
from ptq.report import Console
from tests.helpers import tiny_llama

PERMUTED = {"name": "gptq", "options": {"act_order": "permuted"}}
FAULTS = {"scale", "zero_point", "codes", "weight_clipping"}


def data(seed: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 97, (2, 24), generator=generator)} for _ in range(2)]


def smoothed(scheme: str, recipe: list[Any]) -> tuple[nn.Module, nn.Module]:
    """A model with outliers, and what a recipe makes of it."""
    model = tiny_llama()
    for block in ("model.layers.0", "model.layers.1"):
        inject_behind_norm(model, block)
    quantized = copy.deepcopy(model)
    config = {"scheme": scheme, "recipe": recipe}
    quantize(quantized, config, calibration=data(4), console=Console("quiet"))
    return model, quantized


@pytest.mark.parametrize(
    ("scheme", "recipe"),
    [
        ("w8a8", ["smoothquant"]),
        ("w4a16-g16-asym", ["awq"]),
        ("w8a8", ["smoothquant", "rotation"]),
        ("w8a8", ["rotation", "gptq"]),
        ("w4a8-g16", ["rotation", PERMUTED]),
    ],
)
def test_a_recipe_is_no_damage(scheme: str, recipe: list[Any]) -> None:
    model, quantized = smoothed(scheme, recipe)
    found = diagnose(model, data(), quantized, top=1)
    assert not FAULTS & {layer.cause for layer in found.layers}, str(found)
    # Each layer in the float model's coordinates does about what all together do.
    assert 0.3 < found.whole_kl / found.sum_of_layers < 3, str(found)
    best = found.remedies[0]
    assert best.kl_before == found.layers[0].kl


@pytest.mark.parametrize("recipe", ["smoothquant", "awq", PERMUTED], ids=str)
def test_damage_behind_a_recipe(recipe: Any) -> None:
    model, quantized = smoothed("w4a8-g16", [recipe])
    unrelated, scaled_up = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj"
    permuted_groups(quantized.get_submodule(unrelated))  # type: ignore[arg-type]
    scaled(1.5)(quantized.get_submodule(scaled_up))  # type: ignore[arg-type]
    found = diagnose(model, data(), quantized, top=0)
    assert {(x.layer, x.cause) for x in found.layers if x.cause in FAULTS} == {
        (unrelated, "codes"),
        (scaled_up, "scale"),
    }, str(found)
