"""Scaling groups are found where they are, and only there, in blocks of several families."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptq.transforms import ScaleGroup, apply_scale, find_groups
from ptq.transforms.calls import first_sequence
from tests.transforms.models import FAMILIES, block_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [
    ScaleGroup("input_layernorm", QKV, "norm"),
    ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "norm"),
    ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), "heads", mixes=8),
    ScaleGroup("mlp.up_proj", ("mlp.down_proj",), "linear"),
]
GROUPED = ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), "heads", 0, 8, 2, mixes=8)
FOUND = {
    "llama": [*LLAMA[:2], GROUPED, LLAMA[3]],
    "llama-mha": LLAMA,
    "llama-relu": LLAMA,
    # The norms come after the residual, which reads them too; GELU is not homogeneous.
    "bert": [ScaleGroup("attention.self.value", ("attention.output.dense",), "heads", mixes=8)],
    "gemma2": [
        ScaleGroup("input_layernorm", QKV, "norm", offset=1),
        ScaleGroup("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "norm", 1),
        GROUPED,
        LLAMA[3],
    ],
    "opt": [
        ScaleGroup("self_attn_layer_norm", QKV, "norm"),
        ScaleGroup("final_layer_norm", ("fc1",), "norm"),
        ScaleGroup("self_attn.v_proj", ("self_attn.out_proj",), "heads", mixes=8),
        ScaleGroup("fc1", ("fc2",), "linear"),  # ReLU
    ],
    "gpt_neox": [
        ScaleGroup("input_layernorm", ("attention.query_key_value",), "norm"),
        ScaleGroup("post_attention_layernorm", ("mlp.dense_h_to_4h",), "norm"),
    ],
    # A router and experts without nn.Linear read the second norm.
    "mixtral": [LLAMA[0], GROUPED],
}


def test_every_family_has_an_expectation() -> None:
    assert FOUND.keys() == FAMILIES.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_groups_of_a_family(family: str, dtype: torch.dtype) -> None:
    called = block_of(family, dtype)
    before = {name: t.clone() for name, t in called.block.state_dict().items()}
    with torch.no_grad():
        groups = find_groups(called.block, called.arguments, called.keywords)
    assert [(set(g.targets), g.source, g.kind) for g in groups] == [
        (set(g.targets), g.source, g.kind) for g in FOUND[family]
    ]
    assert [(g.offset, g.head_dim, g.repeats, g.mixes) for g in groups] == [
        (g.offset, g.head_dim, g.repeats, g.mixes) for g in FOUND[family]
    ]
    after = called.block.state_dict()
    assert all(torch.equal(after[name], old) for name, old in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_a_group_keeps_the_output(family: str) -> None:
    called = block_of(family)
    before = called.run()
    generator = torch.Generator().manual_seed(2)
    for group in FOUND[family]:
        weight = called.block.get_submodule(group.targets[0]).weight
        old = weight.detach().clone()
        channels = group.source_channels(weight.shape[1])
        s = torch.randn(int(channels.max()) + 1, generator=generator).mul(1.5).exp()[channels]
        apply_scale(called.block, group, s)
        torch.testing.assert_close(weight.detach(), old * s, rtol=1e-5, atol=0)
        torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=1e-5)


class Mlp(nn.Module):
    """A norm, one layer that reads it, and whatever a test adds."""

    def __init__(self, hidden: float = 0.0, leak: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.other = nn.Parameter(torch.randn(16, 16))
        self.hidden, self.leak = hidden, leak

    def forward(self, x: Tensor, shared: dict[str, Tensor] | None = None) -> Tensor:
        y = self.norm(x)
        up = self.up(y.view(-1, 16))
        if shared is not None and self.leak:
            shared["up"] = up
        out = self.down(up.relu()).view_as(x)
        return x + out + (self.hidden * (y @ self.other) if self.hidden else 0)


def found(block: nn.Module, *arguments: Any, **keywords: Any) -> list[tuple[str, str]]:
    groups = find_groups(block, arguments, keywords)
    return [(g.source, g.kind) for g in groups]


def test_a_hidden_reader_of_a_norm_is_noticed_however_little_it_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16) * 1000  # a residual beside which the block's own part is small
    assert found(Mlp().eval(), x) == [("norm", "norm"), ("up", "linear")]
    for size in (1.0, 0.01, 0.001):
        assert found(Mlp(hidden=size).eval(), x) == [("up", "linear")]


def test_what_is_left_for_later_blocks_counts_as_output() -> None:
    torch.manual_seed(0)
    x, shared = torch.randn(2, 5, 16), {"mask": torch.ones(2, 5)}
    assert found(Mlp(leak=False).eval(), x, shared=shared)[-1] == ("up", "linear")
    assert found(Mlp(leak=True).eval(), x, shared=shared) == [("norm", "norm")]
    alone = {"mask": torch.ones(1, 5)}
    find_groups(Mlp(leak=True).eval(), (x[:1],), {"shared": alone})
    assert alone.keys() == {"mask"}  # the caller's container is as it was


class Values(nn.Module):
    """What grouped-query attention does to its values: two heads of 8, each seen three times."""

    def __init__(
        self, head_dim: int, then: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(16, 16), nn.Linear(48, 16)
        self.head_dim, self.then = head_dim, then

    def forward(self, x: Tensor) -> Tensor:
        heads = self.v(x).unflatten(-1, (2, 8)).repeat_interleave(3, dim=-2)
        heads = heads.cumsum(1).flatten(-2)
        return x + self.o(heads if self.then is None else self.then(heads, x))


def test_a_head_size_is_believed_only_if_it_holds() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    held = ScaleGroup("v", ("o",), "heads", head_dim=8, repeats=3, mixes=8)
    assert find_groups(Values(8), (x,), {}) == [held]
    assert find_groups(Values(4), (x,), {}) == []


@pytest.mark.parametrize(
    "then",
    [lambda heads, _: heads.relu(), lambda heads, x: heads * x.repeat(1, 1, 3).sigmoid()],
    ids=["relu", "a gate for each channel"],
)
def test_what_can_be_scaled_can_not_always_be_mixed(
    then: Callable[[Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    held = ScaleGroup("v", ("o",), "heads", head_dim=8, repeats=3)
    assert find_groups(Values(8, then), (torch.randn(2, 5, 16),), {}) == [held]


def test_an_unused_layer_makes_no_group_and_training_mode_comes_back() -> None:
    block = Mlp()
    with torch.no_grad():
        block.down.weight.zero_()  # nothing depends on the norm
    block.norm.train()
    assert found(block, torch.randn(2, 5, 16)) == []
    assert block.training
    assert block.norm.training


def test_only_the_first_sequence_runs_where_the_batch_is_plain_to_see() -> None:
    x, mask, rotary = torch.randn(3, 5, 16), torch.ones(3, 1, 5, 5), torch.ones(1, 5, 4)
    (one,), rest = first_sequence((x,), {"mask": mask, "rotary": (rotary, None), "at": 2})
    assert torch.equal(one, x[:1])
    assert rest["mask"].shape == (1, 1, 5, 5)
    assert rest["rotary"][0] is rotary
    for unclear in (torch.ones(12, 1, 5), torch.ones(5, 5), object()):
        assert first_sequence((x,), {"unclear": unclear})[0][0] is x
    square = torch.randn(5, 5, 16)
    assert first_sequence((square,), {})[0][0] is square
