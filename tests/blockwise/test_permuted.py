"""Act-order with a permuted layout, from the plan to the files of other toolkits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import ptq
from ptq.checkpoint import assert_same, convert, save
from ptq.config import as_config
from ptq.kernels import Reference
from ptq.modules import QuantLinear, quantized_layers
from tests.blockwise.test_blockwise import PERMUTED, data
from tests.helpers import tiny_llama, tiny_tokens

ASKED = {"scheme": "w4a16-g16", "recipe": [PERMUTED]}


@pytest.fixture(scope="module")
def made() -> nn.Module:
    model = tiny_llama(tied=True)
    ptq.quantize(model, ASKED, calibration=data())
    return model


def test_layers_of_one_input_share_their_order(made: nn.Module) -> None:
    for block in made.model.layers:
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parent = block.self_attn if "q_proj" in names else block.mlp
            orders = [parent.get_submodule(name).input_order for name in names]
            assert all(torch.equal(orders[0], order) for order in orders)
            assert orders[0].tolist() != sorted(orders[0].tolist())


def test_layers_compute_with_the_weight_that_g_idx_says(
    made: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the definition of GPTQ's files: of each input, the code and the scale of its group."""
    monkeypatch.setattr(QuantLinear, "kernel", lambda self, rows: Reference())
    model = copy.deepcopy(made)  # layers keep the kernel that they find
    reference = tiny_llama(tied=True)
    for name, layer in quantized_layers(model).items():
        order = layer.input_order.long()
        place = {k: j for j, k in enumerate(order.tolist())}
        codes, scale = layer.quantized_weight.codes.float(), layer.scale.float()
        columns = [codes[:, place[k]] * scale[:, place[k] // 16] for k in range(len(order))]
        weight = torch.stack(columns, 1)
        assert torch.equal(layer.weight, weight)
        reference.get_submodule(name).weight.data = weight
    want = reference(tiny_tokens()).logits
    torch.testing.assert_close(model(tiny_tokens()).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [["gptq"], [PERMUTED]], ids=["static", "permuted"])
def test_the_plan_says_so_and_counts_the_order(recipe: list[Any], tmp_path: Path) -> None:
    rules = [
        {"layers": "*.o_proj", "scheme": "w8a16"},
        {"layers": "*.down_proj", "scheme": "w8a8"},
        {"layers": "*.1.mlp.up_proj", "scheme": "float"},
    ]
    config = as_config({**ASKED, "recipe": recipe, "rules": rules, "embeddings": "w4a16-g16"})
    model = tiny_llama(tied=True)
    plan = ptq.plan(model, config)
    ordered = {name for name, scheme in plan.schemes.items() if scheme.input_order}
    sorts = recipe == [PERMUTED]
    wanted = {n for n in plan.schemes if n.split(".")[-1] in ("q_proj", "k_proj", "v_proj")}
    wanted |= {n for n in plan.schemes if n.endswith(("gate_proj", "up_proj"))}
    assert ordered == (wanted if sorts else set())
    assert ("w4a16-g16-actorder" in str(plan)) == sorts
    result = ptq.quantize(model, config, calibration=data())
    assert result.plan == plan
    for name, layer in quantized_layers(model).items():
        assert (layer.input_order is not None) == (name in ordered)
    manifest = save(model, tmp_path / "out", config=config)
    assert manifest.total_tensor_bytes == plan.bytes_after


def test_checkpoints(made: nn.Module, tmp_path: Path) -> None:
    save(made, tmp_path / "a", verify="files")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    logits = made(tiny_tokens()).logits
    for again in (ptq.load(tmp_path / "a"), loaded):
        assert_same(made, again)
        assert torch.equal(again(tiny_tokens()).logits, logits)


@pytest.mark.parametrize("layout", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a16-g16-asym", "w8a16-g16"])
def test_as_gptq_and_back(layout: str, scheme: str, tmp_path: Path) -> None:
    """All of it, bit for bit; a layer in order, as rounding to nearest gives it, has no order."""
    model = tiny_llama(tied=True)
    ptq.quantize(model, ASKED | {"scheme": scheme}, calibration=data())
    plain = model.model.layers[1].mlp.down_proj
    plain.input_order.copy_(torch.arange(64))
    save(model, tmp_path / "a")
    options: dict[str, Any] = {"engine": "transformers"}
    convert(tmp_path / "a", tmp_path / "b", layout, **options)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name, layer in quantized_layers(ptq.load(tmp_path / "b")).items():
        ours = model.get_submodule(name)
        assert torch.equal(ours.weight, layer.weight)
        g_idx = tensors[f"{name}.g_idx"]
        if ours is not plain:
            assert torch.equal(ours.input_order, layer.input_order)
            wanted = torch.empty_like(g_idx)
            wanted[ours.input_order.long()] = torch.arange(len(g_idx), dtype=torch.int32) // 16
            assert torch.equal(g_idx, wanted)
        else:
            assert layer.input_order is None
