"""Models whose linear weights are in Conv1D or in fused experts, through quantization and back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import ptq
from ptq.checkpoint import assert_same, compressed_tensors, save
from ptq.errors import CheckpointError, UnsupportedError
from ptq.kernels import Reference
from ptq.model import cast_parameters, skeleton, unfold
from ptq.modules import QuantLinear, quantized_modules
from ptq.planning import matches
from tests.huggingface.families import float_model, inputs, output
from tests.test_planning import _bytes

FAMILIES = ["gpt2", "mixtral", "qwen3_moe", "gpt_oss"]
LEARNED = {"name": "learned_rounding", "options": {"iterations": 4, "sequences": 1}}
DISTILL = {"name": "distill", "options": {"epochs": 1}}


def data(tokens: int, count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    size = (1, tokens)
    return [{"input_ids": torch.randint(3, 97, size, generator=generator)} for _ in range(count)]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantized layer multiplies with the float32 weight that its codes stand for."""
    monkeypatch.setattr(QuantLinear, "kernel", lambda self, rows: Reference())


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g16-asym", "w4a16-tensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_float_model_with_the_dequantized_weights_computes_the_same(
    family: str, scheme: str
) -> None:
    """It is transformers' own, built anew, and takes every tensor by its name and shape."""
    model = float_model(family)
    ptq.quantize(model, scheme)
    quantized = output(model)
    fresh = float_model(family)
    kinds = {name: type(module) for name, module in fresh.named_modules()}
    before = output(fresh)
    ptq.dequantize(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    fresh.load_state_dict(model.state_dict(), strict=True)
    largest = float(quantized.abs().max())
    torch.testing.assert_close(output(fresh), quantized, rtol=0, atol=1e-4 * largest)
    assert not torch.allclose(before, quantized, rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_weight_is_within_half_a_step(family: str) -> None:
    """Against the unfolded float model: the codes are those of the right slice, the right way."""
    model, reference = float_model(family), float_model(family)
    unfold(reference)
    ptq.quantize(model, "w8a16")
    for name, layer in quantized_modules(model).items():
        linear = reference.get_submodule(name)
        assert type(linear) is nn.Linear
        step = layer.scale.abs().float()
        assert ((layer.weight - linear.weight).abs() <= step * (0.5 + 1e-4)).all(), name
        assert layer.bias is linear.bias or torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_counts_right(family: str, dtype: torch.dtype) -> None:
    """Against counts of the model's own tensors; from shapes alone it is the same plan."""
    model = float_model(family)
    made = ptq.plan(model, "w4a16-g16-asym", dtype=dtype)
    assert made.parameters == sum(p.numel() for p in model.parameters())
    assert made.bytes_before == _bytes(model, dtype)
    model.config.architectures = [type(model).__name__]
    assert ptq.plan(skeleton(model.config), "w4a16-g16-asym", dtype=dtype).to_dict() == (
        made.to_dict()
    )
    ptq.quantize(model, "w4a16-g16-asym")
    cast_parameters(model, dtype)
    assert made.bytes_after == _bytes(model, dtype)


def test_the_plan_names_each_expert() -> None:
    made = ptq.plan(float_model("mixtral"), "w8a8")
    layers = {layer.name: layer for layer in made.layers}
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}"
        assert layers[f"{name}.gate_up_proj"].shape == (128, 32)
        assert layers[f"{name}.down_proj"].shape == (32, 64)
        assert layers[f"{name}.down_proj"].kind == "MixtralExperts"
    assert layers["model.layers.1.mlp.gate"].reason == "MixtralTopKRouter is not a linear layer"
    assert "model.layers.*.mlp.experts.*.gate_up_proj" in str(made)


MIXED = [
    {"layers": "*.experts.[01].down_proj", "scheme": "float"},
    {"layers": "*.0.*.experts.*", "scheme": "float"},
    {"layers": "*.h.0.attn.*", "scheme": "float"},
    {"layers": "*.c_fc", "scheme": "w8a8"},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_rules_keep_float_is_stored_as_it_was(tmp_path: Path, family: str) -> None:
    """A whole module of experts that stays float stays fused; a part of one does not."""
    model, before = float_model(family), float_model(family).state_dict()
    names = [info.name for info in ptq.plan(model, "w8a16").layers]
    rules = [r for r in MIXED if any(matches(r["layers"], name) for name in names)]
    ptq.quantize(model, {"scheme": "w4a16-g16", "rules": rules})
    values = model.state_dict()
    kept = [name for name in before if name in values]
    assert all(torch.equal(values[name], before[name]) for name in kept)
    if family == "gpt2":
        assert "transformer.h.0.attn.c_attn.weight" in kept
    elif family == "mixtral":
        assert "model.layers.0.mlp.experts.gate_up_proj" in kept
        part = values["model.layers.1.mlp.experts.0.down_proj.weight"]
        assert torch.equal(part, before["model.layers.1.mlp.experts.down_proj"][0])
        assert part.untyped_storage().nbytes() == part.nbytes
    save(model, tmp_path / "out", shard_bytes=20_000)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for again in (ptq.load(tmp_path / "out"), loaded):
        assert_same(model, again)
        assert torch.equal(output(model), output(again))
    loaded.save_pretrained(tmp_path / "saved")
    assert_same(model, ptq.load(tmp_path / "saved"))
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_bare_base_model_of_the_same_checkpoint(tmp_path: Path, family: str) -> None:
    model = float_model(family)
    ptq.quantize(model, "w8a8")
    save(model, tmp_path / "out")
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert_same(model.base_model, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_lowers_the_error_of_every_layer(family: str) -> None:
    """Of what the first block's layers give for what the float model's layers read, put together
    by hand from hooks on an unfolded float model. The next block's inputs are others by then."""
    batches = data(tokens=60)
    reference = float_model(family)
    unfold(reference)
    rows = _read(reference, batches)
    errors = {}
    for recipe in ("rtn", "gptq"):
        model = float_model(family)
        config = {"scheme": "w4a16-g16", "recipe": [recipe]}
        ptq.quantize(model, config, calibration=batches)
        errors[recipe] = {
            name: float(
                ((layer.weight - reference.get_submodule(name).weight) @ x.T).detach().norm()
            )
            for name, layer in quantized_modules(model).items()
            if (x := rows.get(name)) is not None
        }
    first = [n for n in errors["rtn"] if ".0." in n.split("experts")[0]]
    experts = [n for n in first if ".experts." in n]
    # The first block of the tiny qwen3_moe has none.
    assert len(experts) == (0 if family in ("gpt2", "qwen3_moe") else 8)
    total = {recipe: sum(e[n] for n in first) for recipe, e in errors.items()}
    assert total["gptq"] < 0.8 * total["rtn"]
    assert sum(errors["gptq"][n] < errors["rtn"][n] for n in first) >= len(first) - 1


def _read(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What each linear layer reads of all batches [R, K]."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _, given: found.setdefault(name, []).append(given[0].flatten(0, -2))

    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("recipe", [["gptq"], ["awq", "gptaq", LEARNED, DISTILL]], ids=str)
def test_an_expert_that_no_token_reaches_is_said(recipe: list[Any]) -> None:
    """Two tokens go to four of six experts at most."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6, vocab_size=97, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    options = {"scheme": "w4a16-g16", "recipe": recipe}
    result = ptq.quantize(model, options, calibration=data(tokens=2, count=1))
    said = [r for r in result.remedies if "no calibration row reaches it: rounded to near" in r]
    assert {r.partition(":")[0].rpartition(".")[2] for r in said} == {"gate_up_proj", "down_proj"}
    assert len(quantized_modules(model)) == 16
    assert output(model).isfinite().all()


def test_an_expert_that_reads_other_tokens_than_in_the_float_model_is_said() -> None:
    """There is no input of the float model's beside its own then, which gptaq compares."""
    model = float_model("mixtral")
    config = {"scheme": "w2a16", "recipe": ["gptaq"]}
    result = ptq.quantize(model, config, calibration=data(tokens=40))
    said = [r for r in result.remedies if "upstream error not made up for" in r]
    assert said and all(".experts." in remedy for remedy in said)


@pytest.mark.parametrize("scheme", ["w3a16-tensor", "w3a16-g16-asym"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_transposed_weights_are_refined(family: str, scheme: str) -> None:
    """Every step reads and writes them as they lie in memory."""
    batches = data(tokens=40)
    distances = []
    for recipe in (["rtn"], ["gptaq", {**LEARNED, "options": {"iterations": 20}}, DISTILL]):
        model = float_model(family)
        ptq.quantize(model, {"scheme": scheme, "recipe": recipe}, calibration=batches)
        with torch.no_grad():
            expected = torch.cat([float_model(family)(**batch).logits for batch in batches])
            got = torch.cat([model(**batch).logits for batch in batches])
        distances.append(float((got - expected).norm()))
    assert distances[1] < 0.9 * distances[0]


def test_compressed_tensors_refuses_conv1d(tmp_path: Path) -> None:
    """Its package takes a Conv1D for no layer of its own; experts are in test_experts_elsewhere."""
    model = float_model("gpt2")
    ptq.quantize(model, "w8a8")
    with pytest.raises(UnsupportedError, match=r"is Conv1D in the float model.*--format gptq"):
        compressed_tensors.write(model, tmp_path / "out", engine="transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_model_leaves_ours_as_it_was(tmp_path: Path, family: str) -> None:
    model = float_model(family)
    ptq.quantize(model, "w8a8")
    save(model, tmp_path / "out")
    other = float_model(family)
    other.get_output_embeddings().bias = nn.Parameter(torch.zeros(97))
    was = {name: type(module) for name, module in other.named_modules()}
    with pytest.raises(CheckpointError, match=r"bias, which the model needs"):
        ptq.load(tmp_path / "out", model=other)
    assert {name: type(module) for name, module in other.named_modules()} == was
    mine = float_model(family)
    ptq.load(tmp_path / "out", model=mine)
    assert torch.equal(output(mine), output(model))


def test_generation_and_a_copy() -> None:
    """A deep copy has experts of its own."""
    model = float_model("mixtral")
    ptq.quantize(model, "w8a8")
    other = copy.deepcopy(model)
    ids = inputs(model)["input_ids"]
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        for layer in quantized_modules(model).values():
            layer.scale.zero_()
    assert torch.equal(other.generate(ids, max_new_tokens=4, do_sample=False), before)
    assert not torch.equal(output(model), output(other))
