"""Experts with linear layers of their own compute what transformers' fused experts do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import ptq
from ptq.model.experts import Experts, is_fused_experts

HIDDEN, INNER = 8, 12  # rows of a multiple of 16 bytes, which grouped_mm needs
# Gated; gated and transposed; transposed, interleaved and with biases; without a gate.
KINDS = [MixtralExperts, Qwen3MoeExperts, AriaExperts, GptOssExperts, NemotronHExperts]


def fused(kind: Any, experts: int = 4, implementation: str = "eager") -> nn.Module:
    """Random experts of this class, which reads some of these from its model's configuration."""
    names = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
    config = SimpleNamespace(
        **dict.fromkeys(names, experts),
        hidden_size=HIDDEN,
        moe_hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=1.7,
        swiglu_limit=0.5,
        post_norm_eps=1e-6,
        _experts_implementation=implementation,
    )
    made: nn.Module = kind(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.normal_(generator=generator)
    return made


def routed(tokens: int, k: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states, k different experts of each token, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, index = scores.topk(k, dim=-1)
    return x, index, weights


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 6),
    k=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None)
def test_equals_transformers(
    kind: Any, implementation: str, tokens: int, experts: int, k: int, seed: int
) -> None:
    module = fused(kind, experts, implementation)
    given = routed(tokens, min(k, experts), experts, seed)
    expected = module(*given) if tokens else given[0]
    got = Experts(module)(*given)
    assert got.dtype == given[0].dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """The router's weights may be wider than the hidden states."""
    module = fused(MixtralExperts).to(dtype)
    x, index, weights = routed(7, 2, 4)
    got = Experts(module)(x.to(dtype), index, weights)
    assert got.dtype == dtype
    expected = module(x.to(dtype), index, weights)
    torch.testing.assert_close(got, expected, rtol=8 * torch.finfo(dtype).eps, atol=0.1)


def test_a_number_that_is_no_experts_gives_nothing() -> None:
    """transformers sends tokens of other processes' experts to one beyond the last."""
    module = fused(MixtralExperts)
    x, index, weights = routed(7, 2, 4)
    index[3] = 4
    got = Experts(module)(x, index, weights)
    torch.testing.assert_close(got, module(x, index, weights), rtol=1e-5, atol=1e-5)
    assert not got[3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_are_views(kind: Any) -> None:
    """No weight is copied, and fusing gives back what was there."""
    module = fused(kind)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    experts = Experts(module)
    assert {p.untyped_storage().data_ptr() for p in experts.parameters()} == storages
    assert sum(p.numel() for p in experts.parameters()) == sum(
        p.numel() for p in module.parameters()
    )
    again = experts.fused()
    assert type(again) is kind and again.state_dict().keys() == before.keys()
    assert all(torch.equal(again.state_dict()[name], old) for name, old in before.items())


def test_other_layouts_are_in_the_plan_with_the_reason() -> None:
    """Here a norm behind each expert."""
    module = fused(MuseSparkExperts)
    assert not is_fused_experts(module)
    plan = ptq.plan(nn.ModuleDict({"experts": module, "linear": nn.Linear(8, 8)}), "w8a8")
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["experts"] == "MuseSparkExperts holds experts in a layout that ptq does not know"
