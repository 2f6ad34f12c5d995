"""One layer of the cache, beside transformers' float layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ptq.config import cache_config
from ptq.errors import UnsupportedError
from ptq.kv_cache.layer import QuantizedLayer
from tests.kv_cache.reference import FakeLayer

INT4 = {"bits": 4, "window": 6, "key_group_size": 8}
TOKENS = {"bits": 8, "keys": "token"}
SETTINGS = [
    TOKENS,
    {"bits": 4, "keys": "token", "window": 3, "value_group_size": 8},
    INT4,
    {**INT4, "window": 0},
    {"bits": 8, "keys": "channel", "key_group_size": 8, "values": "channel",
     "value_group_size": 8, "symmetric": False, "window": 2},
]  # fmt: skip
Pair = tuple[Tensor, Tensor]


def tokens(count: int, seed: int = 0, batch: int = 2) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 3, count, 16, generator=generator)
    return keys * 3 + 2, values


def layer(settings: dict, sliding_window: int | None = None) -> QuantizedLayer:
    return QuantizedLayer(cache_config(settings), sliding_window)


def fed(made: DynamicLayer, pair: Pair, pieces: list[int]) -> list[Pair]:
    """What the layer returned for each piece of the tokens."""
    keys, values = (torch.split(x, pieces, 2) for x in pair)
    return [made.update(k, v) for k, v in zip(keys, values, strict=True)]


@pytest.mark.parametrize("sliding_window", [None, 5, 21])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
@settings(max_examples=6, deadline=None)
@given(pieces=st.lists(st.sampled_from([1, 1, 1, 2, 7, 19]), min_size=1, max_size=12))
def test_it_returns_what_the_slow_reference_returns(
    chosen: dict, sliding_window: int | None, pieces: list[int]
) -> None:
    pair = tokens(sum(pieces))
    found = fed(layer(chosen, sliding_window), pair, pieces)
    wanted = fed(FakeLayer(cache_config(chosen), sliding_window), pair, pieces)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sliding_window", [None, 5, 21])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
@settings(max_examples=6, deadline=None)
@given(pieces=st.lists(st.sampled_from([1, 1, 1, 2, 7, 19]), min_size=1, max_size=12))
def test_lengths_are_those_of_the_float_layer(
    chosen: dict, sliding_window: int | None, pieces: list[int]
) -> None:
    made = layer(chosen, sliding_window)
    like = DynamicSlidingWindowLayer(sliding_window) if sliding_window else DynamicLayer()
    for piece in pieces:
        assert made.get_mask_sizes(piece) == like.get_mask_sizes(piece)
        found, expected = made.update(*tokens(piece)), like.update(*tokens(piece))
        assert found[0].shape == expected[0].shape
        assert made.get_seq_length() == like.get_seq_length()
    assert made.get_max_length() == like.get_max_length()


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_the_newest_tokens_are_float_and_exact(chosen: dict) -> None:
    window = cache_config(chosen).window
    keys, values = tokens(41)
    made = layer(chosen)
    fed(made, (keys[:, :, :40], values[:, :, :40]), [33, 7])
    found = made.update(keys[:, :, 40:], values[:, :, 40:])
    newest = window + 1 if window else 0
    for read, written in zip(found, (keys, values), strict=True):
        assert torch.equal(read[:, :, 41 - newest :], written[:, :, 41 - newest :])
        assert not torch.equal(read[:, :, :8], written[:, :, :8])


@pytest.mark.parametrize("sliding_window", [None, 12])
def test_without_a_window_it_does_not_matter_in_what_pieces_tokens_come(
    sliding_window: int | None,
) -> None:
    pair = tokens(30)
    (*_, found) = fed(layer(TOKENS, sliding_window), pair, [1] * 30)
    (whole,) = fed(layer(TOKENS, sliding_window), pair, [30])
    visible = found[0].shape[2]
    assert torch.equal(found[0], whole[0][:, :, -visible:])
    assert torch.equal(found[1], whole[1][:, :, -visible:])


def test_memory_is_that_of_the_tensors_and_stops_growing_with_a_sliding_window() -> None:
    made, sliding = layer(INT4), layer(INT4, 21)
    for one in (made, sliding):
        fed(one, tokens(500), [400, *[1] * 100])
    # 500 tokens: 6 to 13 float ones, the others in groups of 8. Two bytes for scale and zero point
    # of 8 keys of a channel, and of the values of a token.
    floats = 500 - (500 - 6) // 8 * 8
    old = 500 - floats
    per_head = 2 * floats * 16 * 4 + old * 8 + old // 8 * 16 * 2 + old * (8 + 2)
    assert made.nbytes == 2 * 3 * per_head
    assert made.numel == 2 * 3 * 2 * 16 * 500
    kept = sliding.numel // (2 * 3 * 2 * 16)
    assert 20 <= kept < 20 + 8


@pytest.mark.parametrize("sliding_window", [None, 21])
def test_a_long_prompt_leaves_no_memory_behind(sliding_window: int | None) -> None:
    made = layer(INT4, sliding_window)
    fed(made, tokens(500), [500])
    for tensor in (made.keys, made.values):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_sequences_of_the_batch_are_chosen_and_repeated(chosen: dict) -> None:
    pair, more = tokens(40, batch=3), tokens(1, seed=1, batch=4)
    order = torch.tensor([2, 0, 0, 1])
    made = layer(chosen)
    fed(made, pair, [39, 1])
    made.reorder_cache(order)
    found = made.update(*more)
    expected = layer(chosen)
    fed(expected, (pair[0][order], pair[1][order]), [39, 1])
    assert all(map(torch.equal, found, expected.update(*more)))
    assert made.nbytes == expected.nbytes
    made, twice = layer(chosen), layer(chosen)
    fed(made, pair, [40])
    made.batch_repeat_interleave(2)
    fed(twice, (pair[0].repeat_interleave(2, 0), pair[1].repeat_interleave(2, 0)), [40])
    more = tokens(1, seed=1, batch=6)
    assert all(map(torch.equal, made.update(*more), twice.update(*more)))
    made.batch_select_indices(torch.tensor([True, False, True, False, False, False]))
    assert made.update(*tokens(1))[0].shape[0] == 2


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_reset_forgets_everything(chosen: dict) -> None:
    made, fresh = layer(chosen), layer(chosen)
    fed(made, tokens(40), [40])
    made.reset()
    assert made.get_seq_length() == 0
    assert made.nbytes == 0
    other = tokens(9, batch=1)
    assert all(map(torch.equal, made.update(*other), fresh.update(*other)))


@pytest.mark.parametrize("sliding_window", [None, 21])
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
@settings(max_examples=6, deadline=None)
@given(before=st.integers(1, 60), wrong=st.integers(0, 20), right=st.integers(0, 5))
def test_what_is_taken_back_while_the_past_is_recorded_was_never_there(
    chosen: dict, sliding_window: int | None, before: int, wrong: int, right: int
) -> None:
    pair = tokens(before + right)
    made, straight = layer(chosen, sliding_window), layer(chosen, sliding_window)
    fed(made, (pair[0][:, :, :before], pair[1][:, :, :before]), [before])
    made.activate_past_recording()
    if right + wrong:
        extra = tokens(wrong, seed=5)
        both = [torch.cat((x[:, :, before:], y), 2) for x, y in zip(pair, extra, strict=True)]
        made.update(*both)
    made.crop(-wrong)
    fed(straight, pair, [before, right] if right else [before])
    assert made.get_seq_length() == straight.get_seq_length() == before + right
    assert made.nbytes == straight.nbytes
    made.record_past = False
    assert all(map(torch.equal, made.update(*tokens(1)), straight.update(*tokens(1))))


def test_crop_takes_whole_groups_and_refuses_parts() -> None:
    keys, values = tokens(60)
    made = layer(INT4)
    fed(made, (keys, values), [60])  # 48 quantized, 12 float
    made.crop(-5)
    assert made.get_seq_length() == 55
    with pytest.raises(UnsupportedError, match=r"crop\(-10\) would cut .* group of 8 tokens"):
        made.crop(-10)
    assert made.get_seq_length() == 55
    made.crop(-7 - 16)
    straight = layer(INT4)
    fed(straight, (keys[:, :, :32], values[:, :, :32]), [32])
    assert made.get_seq_length() == 32
    found = made.update(*tokens(1))[0][:, :, :24]
    assert torch.equal(found, straight.update(*tokens(1))[0][:, :, :24])
    with pytest.raises(UnsupportedError, match="as a negative one"):
        made.crop(3)
    made.crop(-33)
    assert made.get_seq_length() == 0
    layer(INT4).crop(-3)  # nothing is there


def test_crop_of_a_full_sliding_window_needs_the_past() -> None:
    made = layer(TOKENS, 21)
    fed(made, tokens(30), [30])
    with pytest.raises(UnsupportedError, match="window of 21 tokens is full .*activate_past"):
        made.crop(-1)
    made.crop(0)


def test_heads_are_checked_when_they_come() -> None:
    with pytest.raises(UnsupportedError, match="key_group_size 12 does not divide .* 16 channels"):
        layer({**TOKENS, "key_group_size": 12}).update(*tokens(3))
