"""Checkpoints made in act-order: groups of inputs that are not neighbours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ptq
from ptq.checkpoint import assert_same, convert, packed_int32
from ptq.checkpoint.packed_int32.settings import LayoutName
from ptq.checkpoint.vllm import check_alike
from ptq.errors import CheckpointError, ConfigError, UnsupportedError
from ptq.kernels import Reference
from ptq.modules import QuantLinear, quantized_layers
from tests.checkpoint.compressed_tensors import test_read_write as compressed
from tests.checkpoint.packed_int32 import by_hand
from tests.helpers import quantize_linears, tiny_llama, tiny_tokens

DOWN = "model.layers.1.mlp.down_proj"
LAYOUTS: list[tuple[LayoutName, str]] = [
    ("gptq", "w4a16-g16"),
    ("gptq-v2", "w4a16-g16-asym"),
    ("gptq", "w8a16-g32"),
]


def mixed(model: nn.Module, tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """The tensors, with the inputs of every layer in random groups: another weight."""
    generator = torch.Generator().manual_seed(3)
    for name, layer in quantized_layers(model).items():
        size = layer.scheme.weights.group_size
        assert size is not None
        groups = torch.arange(layer.in_features) // size
        order = torch.randperm(layer.in_features, generator=generator)
        tensors[f"{name}.{key}"] = groups[order].to(torch.int32)
    return tensors


def by_definition(layer: QuantLinear, g_idx: Tensor) -> Tensor:
    """(q - z) * s of each input's group, for the codes that the layer has in order."""
    weight, groups = layer.quantized_weight, g_idx.long()
    zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    return (weight.codes.float() - zero.float()[:, groups]) * weight.scale.float()[:, groups]


def made(tmp_path: Path, layout: LayoutName, scheme: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model as it would be with neighbours for groups, and the tensors in ``theirs``."""
    model = quantize_linears(tiny_llama(tied=True), scheme)
    tensors = mixed(
        model, by_hand.write(model, tmp_path / "theirs", layout, desc_act=True), "g_idx"
    )
    save_file(tensors, tmp_path / "theirs/model.safetensors")
    return model, tensors


@pytest.mark.parametrize(("layout", "scheme"), LAYOUTS)
def test_gptq(
    tmp_path: Path, layout: LayoutName, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights by the definition, outputs of a float model with them, and the same files again."""
    plain, tensors = made(tmp_path, layout, scheme)
    model = ptq.load(tmp_path / "theirs")
    reference = tiny_llama(tied=True)
    for name, layer in quantized_layers(model).items():
        expected = by_definition(plain.get_submodule(name), tensors[f"{name}.g_idx"])
        assert torch.equal(layer.float_weight(torch.float32), expected)
        reference.get_submodule(name).weight.data = expected
        kernels = [
            m.kernel(torch.zeros(1, m.in_features)).name for m in (layer, plain.get_submodule(name))
        ]
        assert kernels[0] == kernels[1]
    packed_int32.write(model, tmp_path / "ours", layout, engine="transformers", scales="keep")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["quantization_config"]["desc_act"] is True
    monkeypatch.setattr(QuantLinear, "kernel", lambda self, rows: Reference())
    want = reference(tiny_tokens()).logits
    torch.testing.assert_close(model(tiny_tokens()).logits, want, rtol=1e-4, atol=1e-4)


def test_it_is_kept_by_ptqs_own_format(tmp_path: Path) -> None:
    _, tensors = made(tmp_path, "gptq", "w4a16-g16")
    model = ptq.load(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "a", "ptq")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for again in (ptq.load(tmp_path / "a"), loaded):
        assert_same(model, again)
        assert torch.equal(model(tiny_tokens()).logits, again(tiny_tokens()).logits)
    loaded.save_pretrained(tmp_path / "b")
    options: dict[str, Any] = {"engine": "transformers", "scales": "keep"}
    convert(tmp_path / "b", tmp_path / "back", "gptq", **options)
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    weight = model.get_submodule(DOWN).float_weight(torch.float32)
    ptq.dequantize(model)
    assert torch.equal(model.get_submodule(DOWN).weight, weight)
    for to in ("compressed-tensors", "awq"):
        with pytest.raises(UnsupportedError, match=r"q_proj has groups.*act-order.*--format gptq"):
            convert(tmp_path / "a", tmp_path / "no", to, engine="transformers")


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a16-g16-asym"])
def test_compressed_tensors_of_older_versions(tmp_path: Path, scheme: str) -> None:
    plain = quantize_linears(tiny_llama(tied=True), scheme)
    root = tmp_path / "out"
    tensors = mixed(plain, compressed.by_hand(plain, root), "weight_g_idx")
    save_file(tensors, root / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight_g_idx of the checkpoint has no place"):
        ptq.load(root)
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (root / "config.json").write_text(json.dumps(config))
    for name, layer in quantized_layers(ptq.load(root)).items():
        expected = by_definition(plain.get_submodule(name), tensors[f"{name}.weight_g_idx"])
        assert torch.equal(layer.float_weight(torch.float32), expected)
    for name in quantized_layers(plain):
        tensors[f"{name}.weight_g_idx"].fill_(-1)
    save_file(tensors, root / "model.safetensors")
    assert_same(plain, ptq.load(root))


def test_what_vllm_makes_one_has_one_order(tmp_path: Path) -> None:
    made(tmp_path, "gptq", "w4a16-g16")
    attention = ptq.load(tmp_path / "theirs").model.layers[0].self_attn
    with pytest.raises(UnsupportedError, match="whose input_order is another.*without act-order"):
        check_alike(attention, ["q_proj", "k_proj"])
    attention.k_proj.input_order.copy_(attention.q_proj.input_order)
    check_alike(attention, ["q_proj", "k_proj"])


def test_it_is_not_asked_for() -> None:
    scheme = {"weights": {"format": "int4", "group_size": 16}, "input_order": True}
    with pytest.raises(ConfigError, match="input_order is decided.*act_order: permuted"):
        ptq.quantize(nn.Sequential(nn.Linear(16, 16)), {"scheme": scheme})
