"""``save_pretrained`` writes a checkpoint that ptq.load and from_pretrained read, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

import ptq
from ptq.checkpoint import assert_same, read_manifest, verify_files
from ptq.errors import CheckpointError
from tests.helpers import tiny_llama, tiny_tokens


def quantized(*, tied: bool = True) -> LlamaForCausalLM:
    model = tiny_llama(tied=tied, dtype=torch.bfloat16)
    ptq.quantize(model, "w4a16-g16-asym")
    return model


def by(maker: str, tmp_path: Path) -> tuple[LlamaForCausalLM, Any]:
    """A quantized model, and the same one made in another way."""
    model = quantized()
    if maker == "quantize":
        return model, model
    ptq.save(model, tmp_path / "first")
    if maker == "load":
        return model, ptq.load(tmp_path / "first")
    return model, AutoModelForCausalLM.from_pretrained(tmp_path / "first")


@pytest.mark.parametrize("shard", ["50GB", "5KB"])
@pytest.mark.parametrize("maker", ["quantize", "load", "from_pretrained"])
def test_round_trip(tmp_path: Path, maker: str, shard: str) -> None:
    model, other = by(maker, tmp_path)
    out = tmp_path / "out"
    other.save_pretrained(out, max_shard_size=shard)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard == "5KB")
    assert verify_files(out) == []
    for again in (ptq.load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert_same(model, again)
        assert torch.equal(model(tiny_tokens()).logits, again(tiny_tokens()).logits)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_it_says_is_what_ptq_save_says(tmp_path: Path) -> None:
    model = quantized()
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=2, pad_token_id=0)
    ours = ptq.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    theirs = read_manifest(tmp_path / "theirs")
    for part in ("layers", "aliases", "tensors", "model_class", "versions"):
        assert getattr(ours, part) == getattr(theirs, part), part
    sections = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("ours", "theirs")
    ]
    assert sections[0] == sections[1]
    again = ptq.load(tmp_path / "theirs")
    assert again.generation_config.max_new_tokens == 3
    ptq.save(again, tmp_path / "back")
    assert_same(model, ptq.load(tmp_path / "back"))


def test_the_names_are_those_of_the_state_dict(tmp_path: Path) -> None:
    """Also where transformers would write old names, as it does for Qwen2-VL and others."""
    model = quantized()
    model.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored.keys() == model.state_dict().keys() - {"lm_head.weight"}


def test_over_a_checkpoint_of_ptq_save(tmp_path: Path) -> None:
    """The older manifest stays behind; what was written last is what is read."""
    out = tmp_path / "out"
    old = quantized(tied=False)
    ptq.save(old, out, shard_bytes=4000)
    model = quantized()
    model.save_pretrained(out)
    assert (out / "ptq_manifest.json").is_file()
    assert_same(model, ptq.load(out))
    assert_same(model, AutoModelForCausalLM.from_pretrained(out))


def test_a_layer_that_was_changed_since(tmp_path: Path) -> None:
    """config.json describes the model as it is when it is saved."""
    model = quantized()
    other = quantized()
    up = other.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert type(again.model.layers[0].mlp.gate_proj) is type(up)
    assert_same(model, again)


def test_dequantized_it_is_a_float_model(tmp_path: Path) -> None:
    model = quantized()
    ptq.dequantize(model)
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(model(tiny_tokens()).logits, again(tiny_tokens()).logits)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tensor .* in .*model\.safetensors is damaged"):
        ptq.load(tmp_path / "out")
    (problem,) = verify_files(tmp_path / "out")
    assert "is damaged" in problem


def edited(path: Path, edit: Any) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, m: t.pop("model.norm.weight"), r"tensor model\.norm\.weight is in none of"),
        (lambda t, m: t.update(more=torch.zeros(1)), "holds tensor more, which"),
        (lambda t, m: m.update(ptq_manifest="{"), r"model\.safetensors is damaged, it is not JSON"),
        (lambda t, m: m.update(ptq_manifest="{}"), r"model\.safetensors is edited or damaged"),
    ],
)
def test_a_damaged_file(tmp_path: Path, edit: Any, message: str) -> None:
    quantized().save_pretrained(tmp_path / "out")
    edited(tmp_path / "out/model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        ptq.load(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len(verify_files(tmp_path / "out")) == 1
