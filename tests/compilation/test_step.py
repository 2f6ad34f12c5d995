"""The compiled step of decoding: masks and the kind of attention."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ptq.compilation.situation import situation
from ptq.compilation.step import CompiledStep, _own_memory, additive
from tests.helpers import tiny_llama, tiny_tokens


def test_a_mask_of_booleans_becomes_one_to_add() -> None:
    mask = torch.tensor([[[[True, False, True]]]])
    least = torch.finfo(torch.bfloat16).min
    found = additive({"full_attention": mask, "none": None}, torch.bfloat16)
    assert found["full_attention"].tolist() == [[[[0.0, least, 0.0]]]]
    assert found["full_attention"].dtype == torch.bfloat16
    assert found["none"] is None
    flat = torch.ones(1, 3, dtype=torch.int64)  # of tokens: the model makes its own of it
    assert additive(flat, torch.float32) is flat


def test_the_kind_of_attention_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    seen = []

    def step(**_: object) -> object:
        seen.append(model.config._attn_implementation)
        raise ValueError("stop")

    compiled = without_compiler(model, step, monkeypatch)
    with pytest.raises(ValueError, match="stop"):
        compiled(input_ids=tiny_tokens(1, 1))
    assert seen == ["eager"]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_composite_and_plain_models_keep_their_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"text_config": object} if kind == "sdpa" else {}
    config = SimpleNamespace(sub_configs=parts, _attn_implementation=kind)
    model = SimpleNamespace(device=torch.device("cpu"), config=config)
    compiled = without_compiler(model, lambda **_: config._attn_implementation, monkeypatch)
    assert compiled(input_ids=None) == kind


def test_a_generation_looks_at_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    cache = begun(model.config)
    compiled = without_compiler(model, lambda **_: "output", monkeypatch)
    looked: list[None] = []
    monkeypatch.setattr(compiled, "_stale", lambda: bool(looked.append(None)))

    def step(rows: int, cache: object) -> None:
        assert compiled(input_ids=tiny_tokens(rows, 1), past_key_values=cache) == "output"

    step(1, cache)
    step(1, cache)
    assert len(looked) == 1
    step(2, cache)  # something else is given
    assert len(looked) == 2
    step(2, begun(model.config))
    assert len(looked) == 3
    compiled.begin()
    step(2, cache)
    assert len(looked) == 4
    for _ in range(2):  # its layers may hold numbers of Python
        step(2, DynamicCache(config=model.config))
    assert len(looked) == 6


def test_what_a_graph_returned_is_copied_but_for_the_cache() -> None:
    cache = StaticCache(config=tiny_llama().config, max_cache_len=8)
    logits, states = torch.randn(1, 3), (torch.randn(2), torch.randn(2))
    given = CausalLMOutputWithPast(logits=logits, hidden_states=states, past_key_values=cache)
    found = _own_memory(given)
    assert found.past_key_values is cache
    for a, b in ((found.logits, logits), *zip(found.hidden_states, states, strict=True)):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def begun(config: Any) -> StaticCache:
    cache = StaticCache(config=config, max_cache_len=8)
    cache.early_initialization(1, 2, 8, torch.float32, "cpu")
    return cache


@pytest.mark.parametrize(
    "value", [object(), [object()], {"a": (1, object())}], ids=["bare", "list", "dict"]
)
def test_what_cannot_be_compared_keeps_torchs_guards(
    value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    compiled = without_compiler(model, lambda **_: "output", monkeypatch)
    step = {"input_ids": tiny_tokens(1, 1), "past_key_values": begun(model.config)}
    assert compiled._unguarded({**step, "more": [1, (2.0, "a")]})
    assert not compiled._unguarded({**step, "more": value})
    assert situation({**step, "more": value}) == situation({**step, "more": value})


def test_what_has_code_of_its_own() -> None:
    config = tiny_llama().config

    def key(**changes: object) -> object:
        cache = StaticCache(config=config, max_cache_len=changes.pop("length", 8))
        cache.early_initialization(1, 2, 8, changes.pop("dtype", torch.float32), "cpu")
        options = {"input_ids": tiny_tokens(1, 1), "use_cache": True, "past_key_values": cache}
        return situation({**options, **changes})

    assert key() == key()
    others = [
        key(length=9), key(dtype=torch.bfloat16), key(input_ids=tiny_tokens(2, 1)),
        key(input_ids=tiny_tokens(1, 1).int()), key(use_cache=1), key(more=None),
    ]  # fmt: skip
    with torch.no_grad():
        others.append(key())
    with torch.autocast("cpu"):
        others.append(key())
    assert key() not in others


def without_compiler(model: Any, code: Any, monkeypatch: pytest.MonkeyPatch) -> CompiledStep:
    """A step that is never stale, with code that is not compiled."""
    compiled = CompiledStep(model, 1)
    monkeypatch.setattr(compiled, "_code", lambda _: code)
    monkeypatch.setattr(compiled, "_stale", lambda: False)
    return compiled
