"""Quantized embeddings: rows within half a step, and one set of codes for a tied head."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertForMaskedLM

import ptq
from ptq.config import as_config, preset
from ptq.errors import ConfigError
from ptq.modules import QuantEmbedding, QuantLinear
from tests.helpers import SIZES, tiny_llama, tiny_tokens

SCHEMES = ("w8a16", "w4a16-g32", "w4a16-g32-asym", "w3a16", "w8a16-tensor")


def quantized(scheme: str, rows: int, columns: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(rows)
    model = nn.Sequential(nn.Embedding(rows, columns, dtype=dtype), nn.Linear(columns, 8))
    ptq.quantize(model, {"scheme": "w8a8", "embeddings": scheme})
    return model


@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 40),
    st.sampled_from((32, 96)),
    st.lists(st.integers(0, 39), max_size=9),
)
def test_rows_are_within_half_a_step(scheme: str, rows: int, columns: int, ids: list[int]) -> None:
    torch.manual_seed(rows)
    table = nn.Embedding(rows, columns)
    wanted = torch.tensor(ids, dtype=torch.long) % rows
    model = nn.Sequential(copy.deepcopy(table), nn.Linear(columns, 8))
    ptq.quantize(model, {"scheme": "w8a8", "embeddings": scheme})
    found = model[0](wanted)
    granularity = preset(scheme).weights.granularity_value
    step = model[0].scale.float().abs().unsqueeze(-1)
    error = granularity.split((model[0].weight - table.weight).abs())
    assert bool((error <= step * 0.5001).all())
    assert torch.equal(found, nn.functional.embedding(wanted, model[0].weight))


def test_the_output_has_the_shape_of_the_ids_and_the_dtype_of_the_model() -> None:
    model = quantized("w4a16-g32", 11, 32, torch.float32)
    ids = torch.tensor([[0, 10, 3], [4, 4, 1]])
    scale = model[0].scale
    assert model[0](ids).shape == (2, 3, 32)
    model.to(torch.bfloat16)
    assert model[0](ids).dtype == torch.bfloat16
    assert model[0].scale is scale
    assert model[0].codes.dtype == torch.uint8


def test_an_id_beyond_the_table_is_an_error() -> None:
    model = quantized("w8a16", 11, 32, torch.float32)
    with pytest.raises(IndexError):
        model[0](torch.tensor([11]))


def test_a_tied_head_shares_the_codes_wherever_the_model_goes(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    reference = copy.deepcopy(model)
    ptq.quantize(model, {"scheme": "w8a8", "embeddings": "w8a16"})
    ids = tiny_tokens()
    with torch.no_grad():
        logits = model(ids).logits
        apart = (logits - reference(ids).logits).abs().max() / reference(ids).logits.abs().max()
    assert apart < 0.1  # of random weights; codes that are not the embedding's give about 1
    ptq.save(model, tmp_path / "out")
    loaded = ptq.load(tmp_path / "out")
    for one in (model, loaded, copy.deepcopy(loaded), copy.deepcopy(model).bfloat16()):
        embedding, head = one.model.embed_tokens, one.lm_head
        assert isinstance(embedding, QuantEmbedding) and isinstance(head, QuantLinear)
        assert head.codes is embedding.codes and head.scale is embedding.scale
    assert torch.equal(loaded(ids).logits, logits)
    moved = copy.deepcopy(model).to("meta")
    assert moved.lm_head.codes is moved.model.embed_tokens.codes


def test_the_plan_counts_shared_codes_once(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    made = ptq.plan(model, {"scheme": "w8a8", "embeddings": "w8a16"})
    ptq.quantize(model, {"scheme": "w8a8", "embeddings": "w8a16"})
    manifest = ptq.save(model, tmp_path / "out")
    assert made.bytes_after == manifest.total_tensor_bytes
    assert manifest.aliases["lm_head.codes"] == "model.embed_tokens.codes"
    assert manifest.layers["model.embed_tokens"].kind == "embedding"


def test_a_head_with_a_bias_of_its_own_shares_the_codes() -> None:
    torch.manual_seed(0)
    config = BertForMaskedLM.config_class(**SIZES, tie_word_embeddings=True)
    model = BertForMaskedLM(config).eval()
    ptq.quantize(model, {"scheme": "w8a16", "embeddings": "w8a16"})
    head = model.cls.predictions.decoder
    assert head.codes is model.bert.embeddings.word_embeddings.codes
    assert head.bias is not None
    assert isinstance(model.bert.embeddings.position_embeddings, nn.Embedding)


def test_untied_heads_follow_the_rules_and_not_the_embedding() -> None:
    model = tiny_llama(tied=True)
    rules = [{"layers": "lm_head", "scheme": "w8a8"}]
    config = {"scheme": "w8a8", "embeddings": "w4a16", "rules": rules}
    ptq.quantize(model, {**config, "tied_embeddings": "untie"})
    assert str(model.lm_head.scheme) == "w8a8"
    assert str(model.model.embed_tokens.scheme) == "w4a16"
    with pytest.raises(ConfigError, match="lm_head, whose weight is tied to the embedding"):
        ptq.plan(tiny_llama(tied=True), config)
    kept = [{"layers": "lm_head", "scheme": "float"}]
    with pytest.raises(ConfigError, match="set tied_embeddings: untie"):
        ptq.plan(tiny_llama(tied=True), {**config, "rules": kept})


def test_dequantize_gives_the_embedding_back_and_ties_it() -> None:
    model = tiny_llama(tied=True)
    before = model.model.embed_tokens.weight.detach().clone()
    ptq.quantize(model, {"scheme": "w8a8", "embeddings": "w8a16"})
    step = model.lm_head.scale.abs()
    ptq.dequantize(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert bool(((model.lm_head.weight - before).abs() <= step * 0.5001).all())


def test_an_embedding_is_looked_up_in_a_compiled_model() -> None:
    model = quantized("w4a16-g32", 50, 32, torch.float32).eval()
    compiled = torch.compile(model[0], backend="aot_eager", dynamic=True, fullgraph=True)
    for length in (1, 5, 9):
        ids = torch.arange(length)
        assert torch.equal(compiled(ids), model[0](ids))


def test_mistakes_are_explained() -> None:
    with pytest.raises(ConfigError, match="w8a8 has quantized activations.*such as w8a16"):
        as_config({"scheme": "w8a8", "embeddings": "w8a8"})
    with pytest.raises(ConfigError, match="no plain nn.Embedding"):
        ptq.plan(nn.Sequential(nn.Linear(8, 8)), {"scheme": "w8a8", "embeddings": "w8a16"})
    with pytest.raises(ConfigError, match="group_size 64 does not divide the input size 32"):
        ptq.plan(tiny_llama(), {"scheme": "w8a8", "embeddings": "w4a16-g64"})
    model = tiny_llama()
    ptq.quantize(model, {"scheme": "w8a8", "embeddings": "w8a16"})
    with pytest.raises(ptq.UnsupportedError, match="model.embed_tokens is already quantized"):
        ptq.plan(model, "w8a8")
