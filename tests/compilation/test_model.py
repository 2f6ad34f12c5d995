"""Compiled models compute what the eager ones do."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

import ptq
from ptq.compilation.step import _own
from ptq.errors import ConfigError, UnsupportedError
from ptq.kv_cache import FixedLayer, cache_settings
from tests.helpers import tiny_bert, tiny_llama, tiny_tokens

# torch's own, from the modules that the compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g32", "w4a8-g32-asym"])
@pytest.mark.parametrize("rows", [1, 4, 12, 100])
def test_compiled_layers_equal_eager_ones(scheme: str, rows: int) -> None:
    """With the real compiler: it may hand an op strides that eager code never has."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(576, 64))
    ptq.quantize(model, scheme)
    x = torch.randn(rows, 576)
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model)(x)
    # Products may be fused and scales multiplied in another order: some float32 roundings, or
    # bfloat16 ones where int4 weights are multiplied in it.
    rounding = torch.finfo(torch.bfloat16).eps if "w4" in scheme and rows > 1 else 1e-5
    assert (found - expected).norm() <= rounding * expected.norm()


def test_a_large_layer_with_the_weight_first() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(2048, 4096))
    ptq.quantize(model, "w8a8")
    x = torch.randn(12, 2048)
    with torch.no_grad():
        expected = model(x)
        assert (torch.compile(model)(x) - expected).norm() <= 1e-5 * expected.norm()


def test_generation_is_compiled_once_and_gives_the_same_logits(tmp_path: Path) -> None:
    torch._dynamo.reset()
    eager = tiny_llama()
    ptq.quantize(eager, "w8a8")
    model = copy.deepcopy(eager)
    assert ptq.compile(model, max_length=48) is model
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    assert before > 0
    for length in (3, 9):
        prompt = tiny_tokens(1, length)
        options = {
            "attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False,
            "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0,
        }  # fmt: skip
        expected = eager.generate(prompt, **options)
        found = model.generate(prompt, **options)
        assert torch.equal(found.sequences, expected.sequences)
        for a, b in zip(found.logits, expected.logits, strict=True):
            assert (a - b).norm() <= b.norm() / 127
    assert counted["unique_graphs"] == before
    ptq.save(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "cache_implementation" not in saved


@pytest.mark.parametrize(
    "cache", [{"bits": 8}, {"bits": 4, "window": 5, "mode": "static"}], ids=str
)
def test_tokens_are_those_of_the_eager_quantized_cache(cache: Any, tmp_path: Path) -> None:
    torch._dynamo.reset()
    eager = tiny_llama()
    ptq.quantize(eager, "w8a16")
    ptq.quantize_cache(eager, cache, calibration=[tiny_tokens(2, 40)])
    model = copy.deepcopy(eager)
    ptq.compile(model, max_length=40)
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    assert before > 0
    for length in (1, 9):
        prompt = tiny_tokens(1, length)
        options = {
            "attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False,
            "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0,
        }  # fmt: skip
        expected, found = eager.generate(prompt, **options), model.generate(prompt, **options)
        assert model.generate.step._latest is not None, "steps after the first have no guards"
        assert isinstance(found.past_key_values.layers[0], FixedLayer)
        assert torch.equal(found.sequences, expected.sequences)
        for a, b in zip(found.logits, expected.logits, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm()
        options["assistant_model"] = tiny_llama(seed=5)
        assert torch.equal(model.generate(prompt, **options).sequences, expected.sequences)
    assert counted["unique_graphs"] == before
    with pytest.raises(UnsupportedError, match="choose the cache of a model that is not compiled"):
        ptq.quantize_cache(model, None)
    ptq.save(model, tmp_path / "out")
    assert cache_settings(ptq.load(tmp_path / "out")) == cache_settings(eager)


def test_a_hook_is_noticed_and_may_read_anything() -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    ptq.compile(model, max_length=16)
    strength = [0.0]
    prompt = tiny_tokens(1, 4)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    for added in (False, True, True):
        if added and not strength[0]:
            for each in (model, other := tiny_llama()):
                each.model.layers[1].mlp.register_forward_hook(
                    lambda _module, _input, output: output + strength[0]
                )
        elif not added:
            other = tiny_llama()
        strength[0] += 3.0
        found = model.generate(prompt, **options, pad_token_id=0)
        assert torch.equal(found, other.generate(prompt, **options, pad_token_id=0))


def test_a_step_that_is_no_single_graph_is_an_error() -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(UnsupportedError, match="cannot be compiled as one graph"):
        ptq.compile(model, max_length=16)
    assert "generate" not in vars(model)


def test_weights_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("ptq.kernels.dequantize._CPU_BLOCK", 64 * 24)
    layer = nn.Linear(64, 56)
    model = nn.Sequential(layer)
    ptq.quantize(model, {"scheme": {"weights": {"format": "int6", "group_size": 16}}})
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)


@torch.no_grad()
def test_lengths_that_another_model_made_dynamic() -> None:
    """What torch has learned of the same code from other models is not used."""
    torch._dynamo.reset()
    other = torch.compile(_own(tiny_llama()), backend="eager")
    for length in (3, 4):
        other(input_ids=tiny_tokens(1, length), attention_mask=torch.ones(1, 1, length, length))
    model = tiny_llama()
    ptq.compile(model, max_length=8)
    prompt = tiny_tokens(1, 4)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "do_sample": False}
    found = model.generate(prompt, **options, pad_token_id=0)
    assert torch.equal(found, tiny_llama().generate(prompt, **options, pad_token_id=0))


def test_every_model_is_compiled_however_many_were_before() -> None:
    """torch's limit of compilations for the same code is one for each model."""
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    with torch._dynamo.config.patch(recompile_limit=1):
        for length in (8, 12, 16):
            before = counted["unique_graphs"]
            ptq.compile(tiny_llama(), max_length=length)
            assert counted["unique_graphs"] > before


def test_a_copy_decodes_its_own_weights() -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    ptq.quantize(model, "w8a16")
    ptq.compile(model, max_length=24)
    twin = copy.deepcopy(model)
    other = tiny_llama(seed=5)
    with torch.no_grad():
        twin.lm_head.weight.copy_(other.lm_head.weight)
    eager = copy.deepcopy(twin)
    del eager.generate
    prompt = tiny_tokens(1, 4)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False,
               "pad_token_id": 0}  # fmt: skip
    assert torch.equal(twin.generate(prompt, **options), eager.generate(prompt, **options))


def test_weights_that_are_loaded_after_compiling_are_used() -> None:
    """Their kernels' forms are others, which the graph does not look for by itself."""
    torch._dynamo.reset()
    model, other = tiny_llama(), tiny_llama(seed=5)
    for each in (model, other):
        ptq.quantize(each, "w8a16")
    prompt = tiny_tokens(1, 4)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False,
               "pad_token_id": 0}  # fmt: skip
    expected = other.generate(prompt, **options)
    ptq.compile(model, max_length=24)
    assert not torch.equal(model.generate(prompt, **options), expected)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(prompt, **options), expected)


@pytest.mark.parametrize(
    "how", ["module", "norm", "parameter", "data", "dtype", "training", "batch", "length"]
)
@torch.no_grad()
def test_what_is_exchanged_after_compiling_is_used(how: str) -> None:
    """torch's own guards are left out."""
    torch._dynamo.reset()
    model = tiny_llama()
    ptq.quantize(model, "w8a16")
    ptq.compile(model, max_length=24)
    last, norm = model.model.layers[-1].mlp, model.model.norm
    if how == "module":
        last.down_proj = nn.Linear(last.down_proj.in_features, last.down_proj.out_features)
    elif how == "norm":
        model.model.norm = nn.Identity()
    elif how == "parameter":
        norm.weight = nn.Parameter(torch.linspace(1, 9, norm.weight.numel()))
    elif how == "data":
        model.lm_head.weight.data = model.lm_head.weight.data[:64].clone()
    elif how == "dtype":
        model.bfloat16()
    elif how == "training":
        norm.register_forward_hook(lambda module, _, y: -y if module.training else y)
        model.train()
    eager = copy.deepcopy(model)
    del eager.generate
    prompt = tiny_tokens(3 if how == "batch" else 1, 40 if how == "length" else 4)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False,
               "pad_token_id": 0}  # fmt: skip
    assert torch.equal(model.generate(prompt, **options), eager.generate(prompt, **options))


def test_a_generation_config_and_another_cache() -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    ptq.quantize(model, "w8a16")
    prompt = tiny_tokens(1, 4)
    mask = torch.ones_like(prompt)
    config = GenerationConfig(
        max_new_tokens=8, do_sample=False, pad_token_id=0, num_return_sequences=1
    )
    model.generation_config.num_return_sequences = 2  # of sampling, which the warm-up is not
    own = copy.deepcopy(model.generation_config)
    expected = model.generate(prompt, attention_mask=mask, generation_config=config)
    ptq.compile(model, max_length=24)
    assert model.generation_config == own
    found = model.generate(prompt, attention_mask=mask, generation_config=config)
    assert torch.equal(found, expected)
    assert config.cache_implementation is None
    cache = DynamicCache(config=model.config)
    found = model.generate(
        prompt, attention_mask=mask, generation_config=config, past_key_values=cache
    )
    assert torch.equal(found, expected)


def test_tuning_comes_before_compiling() -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    ptq.quantize(model, "w8a8")
    ptq.compile(model, max_length=24)
    with pytest.raises(UnsupportedError, match="tune first"):
        ptq.tune(model, cache=False)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr("ptq.compilation.model._stop", None)
    with pytest.raises(TypeError):
        ptq.compile(model, max_length=24)
    assert "generate" not in model.__dict__


def test_an_encoder_is_compiled_for_any_length() -> None:
    torch._dynamo.reset()
    model = tiny_bert()
    ptq.quantize(model, "w8a8")
    tokens = [tiny_tokens(2, n) for n in (7, 7, 12, 19)]
    counted = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        expected = [model(t).last_hidden_state for t in tokens]
        before = counted["unique_graphs"]
        ptq.compile(model)
        for t, e in zip(tokens, expected, strict=True):
            # A sum rounded otherwise may move an activation by one step.
            assert (model(t).last_hidden_state - e).norm() <= e.norm() / 127
    # For the first shape, and for any other; the pooler's two rows are always the same.
    assert counted["unique_graphs"] - before <= 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"max_length": 2}, "max_length 2: choose 4 to"), ({"batch_size": 0}, "batch_size 0")],
)
def test_options_out_of_range(options: dict[str, int], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        ptq.compile(tiny_llama(), **options)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnsupportedError, match="C\\+\\+ compiler"):
        ptq.compile(tiny_llama())
