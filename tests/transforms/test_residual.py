"""The rotation of the residual stream: the float model stays what it was, or is refused whole."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import ptq
from ptq.errors import ConfigError, UnsupportedError
from ptq.model import block_lists
from ptq.report import Console
from ptq.transforms import PREPARATIONS
from ptq.transforms.residual.turn import Turn
from tests.helpers import SIZES, tiny_bert, tiny_llama

STEP = PREPARATIONS["residual_rotation"]
KV = {"num_key_value_heads": 2}
DECODERS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **KV),
    "tied": LlamaConfig(**SIZES, **KV, tie_word_embeddings=True),
    "biases": LlamaConfig(**SIZES, **KV, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, **KV),
    "smollm3": SmolLM3Config(**SIZES, **KV, pad_token_id=0),
    "qwen2": Qwen2Config(**SIZES, **KV),
    "qwen3": Qwen3Config(**SIZES, **KV, head_dim=16),
    "gemma": GemmaConfig(**SIZES, **KV, head_dim=8, pad_token_id=0),
    "granite": GraniteConfig(**SIZES, residual_multiplier=0.3, embedding_multiplier=3.0),
    "phi3": Phi3Config(**SIZES, pad_token_id=0, eos_token_id=1),
    "glm": GlmConfig(**SIZES, **KV, head_dim=8, pad_token_id=0),
}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "stablelm": (StableLmConfig(**SIZES, **KV), "last norm and head do not do the same"),
    "olmo2": (Olmo2Config(**SIZES), r"block model.layers.0 \(Olmo2DecoderLayer\) does not do"),
    "gemma3": (
        Gemma3TextConfig(**SIZES, **KV, head_dim=8, pad_token_id=0),
        r"block model.layers.0 \(Gemma3DecoderLayer\) does not do",
    ),
    "norm with a mean": (GPTNeoXConfig(**SIZES), "last norm and head do not do the same"),
    "norms behind layers": (
        Gemma2Config(**SIZES, **KV, head_dim=8, pad_token_id=0),
        r"block model.layers.0 \(Gemma2DecoderLayer\) does not do the same",
    ),
    "router": (
        MixtralConfig(**SIZES, **KV, num_local_experts=4),
        r"block model.layers.0 \(MixtralDecoderLayer\) does not do the same",
    ),
    "head of an encoder": (BertConfig(**SIZES, is_decoder=True), "do not do the same"),
}


def decoder(config: PreTrainedConfig) -> nn.Module:
    """Random weights, those of norms and biases too, and an embedding with a loud channel."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.get_input_embeddings().weight[:, 3] *= 100
    return model


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(0, 97, (1, 24), generator=generator)} for _ in range(3)]


def prepare(model: nn.Module, **options: int) -> str:
    """Rotate a whole float model; what is said of it."""
    made = STEP.prepare(model, batches()[0], STEP.options(**options), None)
    for names in block_lists(model):
        for name in (*names, *names):  # nothing happens the second time
            made.fold(name)
    return str(made)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(**batches()[1]).logits
    return found


def stream(model: nn.Module) -> Tensor:
    """Rows of the residual stream between the blocks."""
    with torch.no_grad():
        states = model(**batches()[1], output_hidden_states=True).hidden_states
    return torch.cat([state.flatten(0, -2) for state in states[:-1]])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([12, 16, 40, 96, 576]), st.integers(0, 5))
def test_the_matrix_is_orthogonal(size: int, seed: int) -> None:
    turn = Turn.of(size, seed)
    matrix = turn(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(turn(x), x @ matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turn.back(x), x @ matrix.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_the_model_computes_what_it_did_on_a_stream_without_loud_channels(family: str) -> None:
    model = decoder(DECODERS[family])
    before, states = logits(model), stream(model)
    assert prepare(model).startswith("residual stream rotated by ")
    after = logits(model)
    # Sums of float32 in another order, through two blocks.
    assert float((after - before).norm() / before.norm()) < 1e-4
    loud, even = (x.square().mean(0) for x in (states, stream(model)))
    assert float(loud.max() / loud.mean()) > 16
    assert float(even.max() / even.mean()) < 4


def test_blocks_of_several_kinds_are_each_read() -> None:
    model = decoder(DECODERS["llama"])
    block = block_lists(model)[0][1]
    other = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32))
    model.get_submodule(block).mlp = other
    before = logits(model)
    prepare(model)
    after = logits(model)
    assert float((after - before).norm() / before.norm()) < 1e-4


def test_what_rotated_states_are() -> None:
    model = decoder(DECODERS["llama"])
    turn, before = Turn.of(32, 3), stream(model)
    prepare(model, seed=3)
    torch.testing.assert_close(stream(model), before @ turn(torch.eye(32)), rtol=1e-3, atol=1e-3)


def test_seeds_draw_other_signs() -> None:
    models = [decoder(DECODERS["llama"]) for _ in range(3)]
    for model, seed in zip(models, (0, 1, 1), strict=True):
        prepare(model, seed=seed)
    first, second, again = (model.get_input_embeddings().weight for model in models)
    assert not torch.allclose(first, second)
    assert torch.equal(second, again)


def test_norms_multiply_by_one_and_a_tied_head_has_its_own_weight() -> None:
    model = decoder(DECODERS["tied"])
    prepare(model)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == 5
    assert all(bool((p == 1).all()) for p in norms)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is not embedding.weight
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_is_refused_and_nothing_is_touched(case: str) -> None:
    config, message = REFUSED[case]
    model = decoder(config)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=message) as raised:
        asked = {"scheme": "w8a8", "recipe": ["residual_rotation", "rtn"]}
        ptq.quantize(
            model, asked | {"tied_embeddings": "untie"}, calibration=batches(),
            console=Console("quiet"),
        )  # fmt: skip
    assert str(raised.value).endswith("leave the step out")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_structures_are_refused_before_anything_runs() -> None:
    request = {"scheme": "w8a8", "recipe": ["residual_rotation", "rtn"]}
    with pytest.raises(UnsupportedError, match="has no linear output head"):
        ptq.plan(tiny_bert(), request)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=97))
    with pytest.raises(UnsupportedError, match="has 2 lists of blocks, not one"):
        ptq.plan(t5, request)
    odd = LlamaConfig(**SIZES | {"hidden_size": 35, "num_attention_heads": 5, "head_dim": 8})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(odd)
    with pytest.raises(UnsupportedError, match="no Hadamard matrix for 35 channels"):
        ptq.plan(model, request)


def test_a_tied_head_must_be_untied_by_name() -> None:
    request: dict[str, Any] = {"scheme": "w8a8", "recipe": ["residual_rotation", "rtn"]}
    model = tiny_llama(tied=True, dtype=torch.bfloat16)
    message = r"lm_head a weight of its own.*tied_embeddings: untie \(0.0062 MB more in torch.bfl"
    with pytest.raises(ConfigError, match=message):
        ptq.plan(model, request)
    untied = ptq.plan(model, request | {"tied_embeddings": "untie"})
    plain = ptq.plan(model, {"scheme": "w8a8"})
    assert untied.bytes_after - plain.bytes_after == 97 * 32 * 2


@pytest.mark.parametrize("head", ["float", "w8a16"])
def test_the_bytes_are_those_of_the_plan(head: str, tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    request: dict[str, Any] = {
        "scheme": "w8a8",
        "recipe": ["residual_rotation", "gptq"],
        "tied_embeddings": "untie",
        "rules": [{"layers": "lm_head", "scheme": head}],
    }
    result = ptq.quantize(model, request, calibration=batches(), console=Console("quiet"))
    manifest = ptq.save(model, tmp_path / "out")
    assert manifest.total_tensor_bytes == result.plan.bytes_after
    with torch.no_grad():
        again = ptq.load(tmp_path / "out")(**batches()[1]).logits
    assert torch.equal(again, logits(model))


def test_an_untied_head_stays_untied_as_a_float_model(tmp_path: Path) -> None:
    """Whatever the recipe was: loading must not put the embedding in its place."""
    model = tiny_llama(tied=True)
    request: dict[str, Any] = {
        "scheme": "w8a8",
        "recipe": ["gptq"],
        "tied_embeddings": "untie",
        "rules": [{"layers": "lm_head", "scheme": "w4a16"}],
    }
    ptq.quantize(model, request, calibration=batches(), console=Console("quiet"))
    ptq.dequantize(model)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "float")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    assert torch.equal(logits(again), logits(model))


def test_it_comes_first() -> None:
    request = {"scheme": "w8a8", "recipe": ["rotation", "residual_rotation", "rtn"]}
    with pytest.raises(ConfigError, match="a step of the kind 'preparation'"):
        ptq.plan(tiny_llama(), request)
