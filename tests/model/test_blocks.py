"""Blocks are found in the module tree, whatever the architecture."""

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from ptq.model import block_lists
from tests.helpers import SIZES, tiny_bert, tiny_llama


def test_a_decoder_has_one_list() -> None:
    assert block_lists(tiny_llama()) == [["model.layers.0", "model.layers.1"]]


def test_an_encoder_has_one_list() -> None:
    assert block_lists(tiny_bert()) == [["encoder.layer.0", "encoder.layer.1"]]


def test_an_encoder_decoder_has_two_lists() -> None:
    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=97)
    with torch.device("meta"):
        lists = block_lists(T5ForConditionalGeneration(config))
    assert lists == [["encoder.block.0", "encoder.block.1"], ["decoder.block.0", "decoder.block.1"]]


def test_experts_are_part_of_their_block() -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    with torch.device("meta"):
        assert [len(names) for names in block_lists(MixtralForCausalLM(config))] == [2]


def test_a_list_of_bare_linears_is_no_list_of_blocks() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    assert block_lists(model) == []
