"""Carrying hidden states from block to block gives what the whole model gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from ptq.calibrate import (
    NotAChain,
    advance,
    batches_of,
    capture,
    inputs_of,
    inputs_of_model,
    outputs_after_blocks,
)
from ptq.errors import CalibrationError
from ptq.model import block_lists
from tests.helpers import SIZES, tiny_bert, tiny_llama, tiny_tokens


def gemma() -> PreTrainedModel:
    """Every other block has a sliding window: masks and rotary tables differ between blocks."""
    config = Gemma3TextConfig(
        **SIZES, head_dim=8, num_key_value_heads=2, sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM._from_config(config).eval()


def opt() -> PreTrainedModel:
    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM._from_config(config).eval()


def neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM._from_config(GPTNeoXConfig(**SIZES)).eval()


def t5_encoder() -> PreTrainedModel:
    return T5EncoderModel._from_config(T5Config(**T5_SIZES)).eval()


T5_SIZES = {
    "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 3, "num_heads": 4, "vocab_size": 97,
    "decoder_start_token_id": 0,
}  # fmt: skip
MODELS = {
    "t5": t5_encoder,
    "llama": tiny_llama,
    "gemma": gemma,
    "opt": opt,
    "neox": neox,
    "bert": tiny_bert,
}


def batches() -> list[dict[str, Tensor]]:
    """Two batches of different length; the second has padding on the right."""
    padded = torch.ones(2, 5, dtype=torch.int64)
    padded[1, 3:] = 0
    return [
        {"input_ids": tiny_tokens(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.int64)},
        {"input_ids": tiny_tokens(2, 5), "attention_mask": padded},
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_ends_where_the_model_ends(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    (names,) = block_lists(model)
    stream = capture(model, names, batches())
    for position, block in enumerate(names):
        advance(stream, position, model.get_submodule(block))
    for index, batch in enumerate(batches()):
        with torch.no_grad():
            expected = model(**batch)
        made = outputs_after_blocks(model, stream, batch, index)
        torch.testing.assert_close(made[0], expected[0])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    capture(model, block_lists(model)[0], batches())
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(CalibrationError, match="batch 1"):
        capture(model, block_lists(model)[0], [batches()[0], 3])
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_see_what_they_see_in_the_whole_model() -> None:
    model = tiny_llama()
    (names,) = block_lists(model)
    stream = capture(model, names, batches())
    block = model.get_submodule(names[0])
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    for index, rows in enumerate(inputs_of(stream, 0, block, linears)):
        whole = {f"{names[0]}.{n}": m for n, m in linears.items()}
        expected = inputs_of_model(model, whole, batches()[index], index)
        for key, x in rows.items():
            torch.testing.assert_close(x, expected[f"{names[0]}.{key}"])
        assert rows["self_attn.q_proj"] is rows["self_attn.k_proj"]
        assert len(rows["mlp.down_proj"]) == int(batches()[index]["attention_mask"].sum())


def test_no_batches() -> None:
    model = tiny_llama()
    with pytest.raises(CalibrationError, match="no batches"):
        capture(model, block_lists(model)[0], [])


class Skipping(nn.Module):
    """The second block reads what the first one read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x: Tensor) -> Any:
        return self.blocks[0](x) + self.blocks[1](x)


def test_blocks_that_do_not_follow_each_other_are_no_chain() -> None:
    model = Skipping()
    with pytest.raises(NotAChain, match=r"blocks\.1 does not read what blocks\.0 returns"):
        capture(model, ["blocks.0", "blocks.1"], batches_of([torch.ones(1, 4)]))


def test_both_stacks_of_an_encoder_decoder() -> None:
    """Their blocks hand on the position biases that the first one makes, in each batch its own."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration._from_config(T5Config(**T5_SIZES)).eval()
    data = [
        {**batch, "decoder_input_ids": tiny_tokens(len(batch["input_ids"]), length)}
        for batch, length in zip(batches(), (4, 6), strict=True)
    ]
    for names in block_lists(model):
        stream = capture(model, names, data)
        for position, block in enumerate(names):
            advance(stream, position, model.get_submodule(block))
        for index, batch in enumerate(data):
            with torch.no_grad():
                expected = model(**batch, use_cache=False).logits
            torch.testing.assert_close(
                outputs_after_blocks(model, stream, batch, index).logits, expected
            )


class Biased(nn.Module):
    """Returns a tuple; the second value is made from what ``source`` says."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.linear, self.source = nn.Linear(4, 4), source

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Any:
        if self.source == "hidden" and bias is None:
            bias = x.sum(-1)
        if self.source == "own" or bias is None:
            bias = torch.ones(x.shape[:-1])
        y = self.linear(x) + bias[..., None]
        return (y,) if self.source == "nothing" else (y, bias)


class Handing(nn.Module):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Biased(source) for _ in range(3)])

    def forward(self, x: Tensor) -> Any:
        bias = None
        for block in self.blocks:
            x, *others = block(x, bias)
            bias = others[0] if others else None
        return (x,)


@pytest.mark.parametrize("source", ["first", "nothing"])
def test_what_the_first_block_makes_of_no_hidden_states_may_be_handed_on(source: str) -> None:
    model = Handing(source)
    data = [torch.randn(2, 5, 4), torch.randn(3, 6, 4)]
    names = [f"blocks.{i}" for i in range(3)]
    stream = capture(model, names, data)
    for position, block in enumerate(model.blocks):
        advance(stream, position, block)
    for index, batch in enumerate(data):
        torch.testing.assert_close(
            outputs_after_blocks(model, stream, batch, index)[0], model(batch)[0]
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hidden", r"blocks\.0 returns more than hidden states, and it depends on them"),
        ("own", r"blocks\.1 returns more than hidden states, and makes it itself"),
    ],
)
def test_what_depends_on_a_block_is_not_handed_on(source: str, message: str) -> None:
    with pytest.raises(NotAChain, match=message):
        capture(Handing(source), [f"blocks.{i}" for i in range(3)], [torch.randn(2, 5, 4)])
