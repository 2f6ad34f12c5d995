"""A quantized cache of fixed size keeps and reads what the growing one does."""

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache

import ptq
from ptq.config import cache_config
from ptq.errors import UnsupportedError
from ptq.kv_cache import QuantizedCache, held_scales, make_fixed
from ptq.kv_cache.fixed import FixedLayer
from ptq.kv_cache.layer import QuantizedLayer
from tests.kv_cache.test_generate import WAYS, float_model, generate

SETTINGS = [
    {"bits": 8},
    {"bits": 8, "keys": "token"},
    {"bits": 8, "window": 3, "key_group_size": 8, "values": "channel", "value_group_size": 16},
    {"bits": 8, "symmetric": False, "scale_dtype": "float16", "key_group_size": 8},
    {"bits": 4, "window": 5, "key_group_size": 8},
    {"bits": 4},
]
STATIC = [{"bits": 8, "mode": "static"}, {"bits": 4, "mode": "static", "window": 5}]


@pytest.mark.parametrize("prompt", [1, 2, 8, 21, 64, 70])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_what_is_read_is_equal_bit_for_bit(chosen: Any, prompt: int) -> None:
    torch.manual_seed(0)
    settings = cache_config(chosen)
    growing, fixed = QuantizedLayer(settings), FixedLayer(settings, 145)
    for length in (prompt, *[1] * (145 - prompt)):
        new = torch.randn(2, 2, 3, length, 16)
        wanted, found = growing.update(*new), fixed.update(*new)
        for a, b in zip(wanted, found, strict=True):
            assert torch.equal(a, b[:, :, : growing.seen])
    assert fixed.max_cache_len % fixed.step == 0


def fixed_cache(model: Any, length: int) -> StaticCache:
    cache = StaticCache(model.config, length)
    make_fixed(cache, model.config, ptq.kv_cache.cache_settings(model), held_scales(model))
    return cache


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chosen", [SETTINGS[0], SETTINGS[4], *STATIC], ids=str)
def test_the_text_is_that_of_the_growing_cache(chosen: Any, way: str) -> None:
    """With padding on the left, and beams that change places."""
    model = copy.deepcopy(float_model("llama"))
    ptq.quantize_cache(model, chosen, calibration=[torch.arange(3, 63)[None]])
    wanted = generate(model, **WAYS[way])
    found = generate(
        model, past_key_values=fixed_cache(model, 50), disable_compile=True, **WAYS[way]
    )
    assert isinstance(wanted.past_key_values, QuantizedCache)
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        # Attention over more tokens rounds otherwise; a tie may become the code beside it.
        assert (a - b).norm() <= b.norm() / 127


def test_its_size() -> None:
    """A byte for each of 128 tokens' 2 x 3 x 16 numbers, of keys and values; a byte for the scale
    of a channel's keys in 64 tokens, and of a token's values; floats of one group and no more."""
    layer = FixedLayer(cache_config("int8"), 128)
    layer.update(*torch.zeros(2, 2, 3, 5, 16))
    codes, scales = 2 * 128 * 2 * 3 * 16, 2 * 2 * 3 * 16 + 128 * 2 * 3
    assert layer.nbytes == codes + scales + 2 * 64 * 2 * 3 * 16 * 4
    layer.reset()
    assert layer.nbytes == 0


def test_a_prompt_comes_in_one_piece() -> None:
    layer = FixedLayer(cache_config("int8"), 32)
    states = torch.zeros(2, 1, 2, 4, 8)
    layer.update(*states)
    with pytest.raises(UnsupportedError, match="one piece: leave out prefill_chunk_size"):
        layer.update(*states)


@pytest.mark.parametrize("name, message", [
    ("mistral", "layer 0 of this mistral model has a sliding window"),
    ("gemma3", "layer 0 of this gemma3_text model has a sliding window"),
    ("t5", "T5ForConditionalGeneration is an encoder-decoder"),
])  # fmt: skip
def test_models_that_are_not_compiled_with_it(name: str, message: str) -> None:
    model = ptq.quantize_cache(copy.deepcopy(float_model(name)), "int8")
    generate_before = model.generate
    with pytest.raises(UnsupportedError, match=message):
        ptq.compile(model)
    assert model.generate is generate_before
