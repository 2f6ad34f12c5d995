"""Generating with a quantized cache: the same text as with a slow float reference of it."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

import ptq
from ptq.errors import ConfigError, UnsupportedError
from ptq.kv_cache import QuantizedCache, cache_settings, new_cache
from tests.helpers import tiny_bert, tiny_llama
from tests.kv_cache.reference import fake_cache, step_of

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SEQ2SEQ = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "vocab_size": 97}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=8, sliding_window=20),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "t5": lambda: transformers.T5Config(
        **SEQ2SEQ, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    ),
}  # fmt: skip
CACHES = [{"bits": 8, "keys": "token"}, {"bits": 4, "window": 5, "key_group_size": 8}]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@cache
def float_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(MODELS[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def prompt() -> dict[str, Tensor]:
    """Two sequences; the first is padded on the left."""
    ids = torch.randint(3, 97, (2, 22), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, new_tokens: int = 16, **options: Any) -> Any:
    torch.manual_seed(3)
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, **options}
    kinds = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**prompt(), **settings, **kinds)


def reference_cache(model: Any) -> Any:
    settings = cache_settings(model)
    like = new_cache(model)
    if not isinstance(like, EncoderDecoderCache):
        return fake_cache(like, settings)
    decoder = model.config.get_text_config(decoder=True)
    own = fake_cache(like.self_attention_cache, settings)
    return EncoderDecoderCache(own, DynamicCache(config=decoder))


@pytest.mark.parametrize("chosen", CACHES, ids=str)
@pytest.mark.parametrize(
    "name, way",
    [("llama", way) for way in WAYS]
    + [("mistral", "beams"), ("gemma3", "greedy"), ("t5", "greedy"), ("t5", "beams")],
)
def test_the_text_is_that_of_the_slow_reference(name: str, chosen: Any, way: str) -> None:
    model = copy.deepcopy(float_model(name))
    assert ptq.quantize_cache(model, chosen) is model
    found = generate(model, **WAYS[way])
    wanted = generate(model, past_key_values=reference_cache(model), **WAYS[way])
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    own = getattr(found.past_key_values, "self_attention_cache", found.past_key_values)
    assert isinstance(own, QuantizedCache)
    assert any(layer.stored is not None for layer in own.quantized)
    unlike = generate(float_model(name), **WAYS[way])
    assert not torch.allclose(unlike.logits[-1], found.logits[-1], rtol=1e-4, atol=1e-4)


def test_attention_is_as_near_to_the_float_one_as_half_a_step_allows() -> None:
    torch.manual_seed(0)
    keys, values, query = torch.randn(3, 1, 2, 48, 16)
    query = query[:, :, -1:] * 0.2
    made = QuantizedCache(transformers.LlamaConfig(**SIZES), bits=4, window=8, key_group_size=8)
    made.update(keys[:, :, :47], values[:, :, :47], 0)
    read = made.update(keys[:, :, 47:], values[:, :, 47:], 0)
    attention = torch.nn.functional.scaled_dot_product_attention
    found, wanted = attention(query, *read), attention(query, keys, values)
    assert not torch.equal(found, wanted)
    for h in range(2):
        parts = [keys[0, h, t : t + 8, d] for t in range(0, 40, 8) for d in range(16)]
        key_step = max(step_of(part, made.settings) for part in parts)
        value_step = max(step_of(values[0, h, t], made.settings) for t in range(40))
        # No logit moves by more than delta, so no weight by more than a factor exp(2 delta).
        delta = query[0, h].abs().sum().item() * key_step / 2 / 16**0.5
        bound = value_step / 2 + torch.tensor(2 * delta).expm1() * values[0, h].abs().max()
        assert (found[0, h] - wanted[0, h]).abs().max() <= bound


def test_what_a_call_asks_for_comes_first() -> None:
    model = copy.deepcopy(float_model("llama"))
    wanted = generate(model)
    ptq.quantize_cache(model, "int8")
    assert isinstance(generate(model).past_key_values, QuantizedCache)
    assert torch.equal(generate(model, past_key_values=DynamicCache()).sequences, wanted.sequences)
    config = transformers.GenerationConfig(cache_implementation="static", max_new_tokens=24)
    static = model.generate(
        prompt()["input_ids"], config, return_dict_in_generate=True, pad_token_id=0
    )
    assert isinstance(static.past_key_values, transformers.StaticCache)
    assert ptq.quantize_cache(model, None) is model
    assert cache_settings(model) is None
    assert torch.equal(generate(model).sequences, wanted.sequences)
    assert type(generate(model).past_key_values) is DynamicCache


def test_a_copy_generates_with_its_own_weights() -> None:
    model = ptq.quantize_cache(copy.deepcopy(float_model("llama")), "int8")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not torch.equal(generate(twin).sequences, generate(model).sequences)
    assert cache_settings(twin) == cache_settings(model)


@pytest.mark.parametrize("chosen", CACHES, ids=str)
def test_assisted_decoding(chosen: Any) -> None:
    """What a wrong guess left in the cache is taken back, whatever has been quantized since."""
    model = ptq.quantize_cache(copy.deepcopy(float_model("llama")), chosen)
    ids = prompt()["input_ids"][1:]
    made = model.generate(
        ids,
        assistant_model=tiny_llama(),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert made.sequences.shape[1] == 62
    assert made.past_key_values.get_seq_length() == 61
    helped = float_model("llama").generate(
        ids, assistant_model=model, max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    alone = float_model("llama").generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(helped, alone)


def test_a_long_conversation_goes_on_with_the_same_cache() -> None:
    model = float_model("llama")
    settings = {"bits": 4, "window": 5, "key_group_size": 8}
    cache = QuantizedCache(model.config, **settings)
    ids = prompt()["input_ids"][1:]
    for _ in range(3):
        ids = model.generate(
            ids, past_key_values=cache, max_new_tokens=10, do_sample=False, pad_token_id=0
        )
    assert cache.get_seq_length() == 22 + 30 - 1
    assert cache.size().tokens == 51
    cache.reset()
    assert cache.size().nbytes == 0


@pytest.mark.parametrize("value, message", [
    ("int3", r"kv_cache: unknown kind of cache 'int3': give int8, int4"),
    ({"bits": 3}, "kv_cache: bits: input should be 4 or 8, got 3"),
    ({"bits": 4, "windows": 3}, "kv_cache: unknown key 'windows'; did you mean 'window'?"),
    ({"bits": 8, "window": -1}, "window: input should be greater than or equal to 0"),
])  # fmt: skip
def test_wrong_settings(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ptq.quantize_cache(float_model("llama"), value)
    assert cache_settings(float_model("llama")) is None


def test_wrong_settings_of_the_class() -> None:
    with pytest.raises(ConfigError, match="QuantizedCache: bits: input should be 4 or 8, got 3"):
        QuantizedCache(transformers.LlamaConfig(**SIZES), bits=3)
    with pytest.raises(UnsupportedError, match="value_group_size 12 does not divide .* 8 channels"):
        QuantizedCache(transformers.LlamaConfig(**SIZES), bits=4, value_group_size=12)


def test_models_without_such_a_cache() -> None:
    with pytest.raises(UnsupportedError, match="BertModel does not generate"):
        ptq.quantize_cache(tiny_bert(), "int8")
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97)
    with torch.device("meta"):
        mamba = transformers.MambaForCausalLM(config)
        rwkv = transformers.RwkvForCausalLM(
            transformers.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
        )
    with pytest.raises(UnsupportedError, match="mamba model .*layers: linear_attention"):
        ptq.quantize_cache(mamba, "int8")
    with pytest.raises(UnsupportedError, match="RwkvForCausalLM generates in its own way"):
        ptq.quantize_cache(rwkv, "int8")


def test_generation_that_has_no_place_for_it() -> None:
    model = copy.deepcopy(float_model("llama"))
    model.generation_config.use_cache = False
    with pytest.raises(UnsupportedError, match="generation_config says use_cache=False"):
        ptq.quantize_cache(model, "int8")
    model.generation_config.use_cache = True
    model.generate = print
    with pytest.raises(UnsupportedError, match="replaced already"):
        ptq.quantize_cache(model, "int8")
