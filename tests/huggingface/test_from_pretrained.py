"""``from_pretrained`` gives the model of a ptq checkpoint, bit for bit as ptq.load does."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import ptq
from ptq.checkpoint import assert_same, save
from ptq.core import QuantizedWeight
from ptq.modules import QuantEmbedding, QuantLinear, quantized_modules
from tests.helpers import quantize_linears, tiny_llama, tiny_tokens
from tests.huggingface.families import FAMILIES, auto_class, float_model, inputs, output

SCHEMES = ("w8a16", "w8a8", "w4a16-g16-asym", "w3a16-g16")


def loaded(directory: Path, cls: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """With every weight from the files: transformers reports none as missing."""
    model, info = cls.from_pretrained(directory, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert isinstance(model, PreTrainedModel) and not model.training
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g16-asym"])
def test_families(tmp_path: Path, family: str, scheme: str) -> None:
    model = float_model(family)
    before = output(model)
    made = ptq.quantize(model, scheme).plan
    assert all(layer.scheme is not None or layer.reason for layer in made.layers)
    assert {layer.name for layer in made.quantized} == set(quantized_modules(model))
    assert len(quantized_modules(model)) >= 8
    save(model, tmp_path / "out")
    again = loaded(tmp_path / "out", auto_class(family))
    assert_same(ptq.load(tmp_path / "out"), again)
    assert torch.equal(output(model), output(again))
    assert not torch.equal(before, output(again))
    again.save_pretrained(tmp_path / "saved")
    assert_same(model, ptq.load(tmp_path / "saved"))
    assert_same(model, loaded(tmp_path / "saved", auto_class(family)))


def static(model: PreTrainedModel) -> dict[str, Any]:
    return {"calibration": [inputs(model)]}


RULES: dict[str, tuple[dict[str, Any], bool]] = {
    "head": (
        {"rules": [{"layers": "lm_head", "scheme": "w8a16"}], "tied_embeddings": "untie"},
        False,
    ),
    "embedding": ({"embeddings": "w8a16"}, False),
    "some float": ({"rules": [{"layers": "*.mlp.*", "scheme": "float"}]}, False),
    "two schemes": ({"rules": [{"layers": "*.mlp.*", "scheme": "w8a8"}]}, False),
    "static": ({"scheme": "w8a8-static"}, True),
    "rotation": (
        {"scheme": "w8a8", "recipe": [{"name": "rotation", "options": {"gain": 0.0}}, "rtn"]},
        True,
    ),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("what", RULES)
def test_what_a_recipe_can_make(tmp_path: Path, what: str, tied: bool) -> None:
    config, data = RULES[what]
    model = tiny_llama(tied=tied)
    ptq.quantize(model, {"scheme": "w4a16-g16", **config}, **(static(model) if data else {}))
    save(model, tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert_same(model, again)
    assert torch.equal(output(model), output(again))
    assert ("rotation" in what) == any(
        m.scheme.input_rotation is not None for m in quantized_modules(again).values()
    )
    again.save_pretrained(tmp_path / "saved")
    assert_same(model, ptq.load(tmp_path / "saved"))
    assert_same(model, loaded(tmp_path / "saved"))


def test_a_head_tied_to_a_quantized_embedding(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    ptq.quantize(model, {"scheme": "w4a16-g16", "embeddings": "w8a16"})
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert isinstance(model.lm_head, QuantLinear)
    save(model, tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert again.lm_head.codes is again.model.embed_tokens.codes
    again.to(torch.bfloat16)
    assert again.lm_head.scale is again.model.embed_tokens.scale


def test_a_quantized_head_whose_bias_is_tied(tmp_path: Path) -> None:
    model = float_model("bert")
    rules = [{"layers": "cls.predictions.decoder", "scheme": "w8a16"}]
    ptq.quantize(model, {"scheme": "w8a16", "rules": rules, "tied_embeddings": "untie"})
    save(model, tmp_path / "out")
    again = loaded(tmp_path / "out", transformers.AutoModelForMaskedLM)
    assert isinstance(again.cls.predictions.decoder, QuantLinear)
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias
    assert_same(model, again)
    assert torch.equal(output(model), output(again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is float becomes this dtype; codes and scales stay as they are."""
    model = quantize_linears(float_model("opt"), "w4a16-g16")
    save(model, tmp_path / "out")
    again = loaded(tmp_path / "out", dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    layer, other = (m.model.decoder.layers[1].fc2 for m in (model, again))
    assert torch.equal(layer.codes, other.codes) and torch.equal(layer.scale, other.scale)
    assert other.scale.dtype == torch.float16 and other.bias.dtype == dtype
    assert again(tiny_tokens()).logits.dtype == dtype


def test_scales_stay_where_transformers_keeps_a_layer_in_float32(tmp_path: Path) -> None:
    """T5's ``wo`` in a float16 model is one."""
    save(quantize_linears(float_model("t5"), "w4a16-g16"), tmp_path / "out")
    again = loaded(tmp_path / "out", transformers.AutoModelForSeq2SeqLM, dtype=torch.float16)
    assert again.encoder.block[0].layer[1].DenseReluDense.wo.scale.dtype == torch.float16


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
def test_device_map_and_shards(tmp_path: Path, options: dict[str, Any]) -> None:
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g16-asym")
    save(model, tmp_path / "out", shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_same(model, loaded(tmp_path / "out", local_files_only=True, **options))


@pytest.fixture
def no_weight_is_decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise AssertionError("a quantized weight was dequantized")

    monkeypatch.setattr(QuantizedWeight, "dequantize", refuse)
    yield


@pytest.mark.usefixtures("no_weight_is_decoded")
def test_loading_makes_no_float_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is decoded, and no float tensor as large as a quantized weight has memory."""
    model = quantize_linears(tiny_llama(tied=True), "w8a16")
    sizes = {m.codes.numel() for m in model.modules() if isinstance(m, QuantLinear)}
    assert model.model.embed_tokens.weight.numel() not in sizes
    save(model, tmp_path / "out")
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() in sizes:
                made.append((str(func), out.dtype, out.device.type))
            return out

    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the watch sees this thread only
    with Watch():
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made  # the watch works: it sees the codes
    assert not [m for m in made if m[1].is_floating_point and m[2] != "meta"]


def test_what_kernels_read_is_aligned(tmp_path: Path) -> None:
    """In a mapped file it is wherever the header ends; a kernel would copy it, or crash."""
    model = tiny_llama(tied=True)
    ptq.quantize(model, "w8a16")
    for number in range(4):
        model.register_buffer("x" * (number + 1), torch.zeros(1, dtype=torch.int8))
        model.save_pretrained(tmp_path / "saved")
        layers = quantized_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
        held = [tensor for layer in layers.values() for tensor in layer.buffers()]
        assert held and all(tensor.data_ptr() % 64 == 0 for tensor in held)


def hub_cache(root: Path, checkpoint: Path) -> None:
    """The cache of a downloaded repository: what transformers downloads, as links to blobs."""
    commit = "0123456789" * 4
    repository = root / "models--somebody--tiny"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for directory in (snapshot, blobs, repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    for path in checkpoint.iterdir():
        if path.name == "config.json" or ".safetensors" in path.name:
            (blobs / path.name).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))


@pytest.mark.parametrize("shard_bytes", [4000, 10**9])
def test_a_hub_repository_without_its_manifest(tmp_path: Path, shard_bytes: int) -> None:
    model = quantize_linears(tiny_llama(tied=True), "w4a16-g16")
    save(model, tmp_path / "out", shard_bytes=shard_bytes)
    hub_cache(tmp_path / "hub", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(
        "somebody/tiny", cache_dir=tmp_path / "hub", local_files_only=True
    )
    assert_same(model, again)


def test_other_auto_classes(tmp_path: Path) -> None:
    """The base model of a decoder and of an encoder-decoder; a new head on the old base."""
    model = quantize_linears(tiny_llama(), "w8a16", head=True)
    save(model, tmp_path / "llama")
    base = loaded(tmp_path / "llama", AutoModel)
    assert_same(model.model, base)
    cls = transformers.AutoModelForSequenceClassification
    other, info = cls.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert_same(model.model, other.model)
    t5 = quantize_linears(float_model("t5"), "w8a16")
    save(t5, tmp_path / "t5")
    assert_same(t5.encoder, loaded(tmp_path / "t5", transformers.T5EncoderModel).encoder)


def test_a_head_on_a_base_model(tmp_path: Path) -> None:
    """A checkpoint of a base model, with the tied head that the configuration promises."""
    base = quantize_linears(tiny_llama(tied=True).model, "w8a16")
    save(base, tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert_same(base, model.model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_model_is_as_transformers_wants_it(tmp_path: Path) -> None:
    save(quantize_linears(tiny_llama(), "w8a16"), tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert model.is_quantized and model.hf_quantizer is not None
    assert not model.hf_quantizer.is_trainable
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert model.config.quantization_config.to_dict() == section
    layer = model.model.layers[0].mlp.up_proj
    assert layer.shared_input is model.model.layers[0].mlp.gate_proj.shared_input
    model.dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert getattr(model, "hf_quantizer", None) is None


def test_a_pooler_that_was_not_saved(tmp_path: Path) -> None:
    """transformers makes it anew, and says so; it is no damage."""
    masked = quantize_linears(float_model("bert"), "w8a16")
    save(masked, tmp_path / "out")
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert_same(masked.bert.encoder, model.encoder)
