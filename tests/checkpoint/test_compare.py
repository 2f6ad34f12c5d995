"""assert_same finds every difference that a checkpoint could have."""

import copy

import pytest
import torch
from torch import nn

from ptq.checkpoint import assert_same
from ptq.config import Scheme
from ptq.errors import CheckpointError
from tests.helpers import quantize_linears, tiny_llama


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    model = quantize_linears(tiny_llama(tied=True, dtype=torch.bfloat16), "w4a16-g32-asym")
    return model, copy.deepcopy(model)


def differs(a: nn.Module, b: nn.Module, pattern: str) -> None:
    for first, second in ((a, b), (b, a)):
        with pytest.raises(CheckpointError, match=pattern):
            assert_same(first, second)


def test_copies_are_the_same(pair: tuple[nn.Module, nn.Module]) -> None:
    assert_same(*pair)


def test_every_stored_tensor_counts(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = pair
    for key, tensor in b.state_dict().items():
        raw = tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
        raw.view(-1)[-1] ^= 1
        if key != "lm_head.weight":  # the same memory as the embedding
            differs(a, b, f"tensor {key} differs in its values")
        raw.view(-1)[-1] ^= 1
    assert_same(a, b)


def test_bits_not_numbers() -> None:
    linear = quantize_linears(nn.Sequential(nn.Linear(8, 8)), "w8a16")
    for value, other, same in ((torch.nan, torch.nan, True), (0.0, -0.0, False)):
        a, b = copy.deepcopy(linear), copy.deepcopy(linear)
        a.register_buffer("x", torch.tensor(value))
        b.register_buffer("x", torch.tensor(other))
        if same:
            assert_same(a, b)
        else:
            differs(a, b, "tensor x differs in its values")


def test_buffers_that_are_not_stored(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = pair
    b.get_buffer("model.rotary_emb.inv_freq")[0] += 1
    differs(a, b, r"tensor model\.rotary_emb\.inv_freq differs in its values")


def test_the_cast_of_a_whole_model_is_noticed(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = pair
    differs(a, b.to(torch.bfloat16), r"inv_freq differs: (b?float\d+) .* against")


def test_dtypes_and_shapes(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = pair
    b.model.norm.weight = nn.Parameter(b.model.norm.weight.float())
    differs(a, b, r"tensor model\.norm\.weight differs: b?float")
    b.model.norm.weight = nn.Parameter(a.model.norm.weight.detach()[None])
    differs(a, b, r"tensor model\.norm\.weight differs: .*\[(1, )?32\] against")


def test_ties(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = pair
    b.lm_head.weight = nn.Parameter(b.lm_head.weight.detach().clone())
    differs(a, b, r"tied tensor lm_head\.weight is in one of the models only")


def test_names(pair: tuple[nn.Module, nn.Module]) -> None:
    a, b = pair
    b.register_buffer("more", torch.zeros(1))
    differs(a, b, "tensor more is in one of the models only")


def test_layers_and_schemes() -> None:
    """Dynamic activations leave no tensor behind, but change what a layer computes."""
    model = nn.Sequential(nn.Linear(8, 8))
    symmetric, asymmetric = (
        Scheme.model_validate({"activations": {"symmetric": symmetric}})
        for symmetric in (True, False)
    )
    a, b = (quantize_linears(copy.deepcopy(model), s) for s in (symmetric, asymmetric))
    differs(a, b, "layer 0 differs: .*symmetric=(True|False)")
    differs(a, model, "quantized layer 0 is in one of the models only")


def test_a_model_without_values_is_not_the_same() -> None:
    model = quantize_linears(nn.Sequential(nn.Linear(8, 8)), "w8a16")
    differs(model, copy.deepcopy(model).to("meta"), r"tensor 0\.\w+ has no values")
