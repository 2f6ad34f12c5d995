"""Scaling in narrow dtypes: what the norm cannot hold, its readers do not get."""

import pytest
import torch
from torch import Tensor, nn

from ptq.transforms import ScaleGroup, apply_scale


class Gemma(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, dtype=dtype)
        self.linear = nn.Linear(64, 8, bias=False, dtype=dtype)
        nn.init.normal_(self.norm.weight, std=0.3)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_factor_and_the_scale_of_a_bfloat16_norm_multiply_to_the_old_factor(
    offset: int,
) -> None:
    torch.manual_seed(0)
    block = Gemma(torch.bfloat16)
    group = ScaleGroup("norm", ("linear",), "norm", offset)
    old, weight = block.norm.weight.float() + offset, block.linear.weight.detach().clone()
    wanted = torch.randn(64).mul(1.5).exp()
    s = apply_scale(block, group, wanted)
    torch.testing.assert_close((block.norm.weight.float() + offset) * s, old, rtol=1e-6, atol=0)
    assert torch.equal(block.linear.weight, (weight.float() * s).bfloat16())
    assert float((s / wanted).log().abs().median()) < 0.02


def test_a_channel_whose_factor_would_vanish_keeps_its_scale() -> None:
    block = Gemma(torch.bfloat16)
    weight = block.linear.weight.detach().clone()
    with torch.no_grad():
        block.norm.weight.fill_(0.0)
        block.norm.weight[5] = -1.0  # the factor is zero already
    wanted = torch.ones(64)
    wanted[3], wanted[5] = 1000.0, 2.0  # 1 / 1000 - 1 is -1 in bfloat16
    s = apply_scale(block, ScaleGroup("norm", ("linear",), "norm", 1), wanted)
    assert torch.equal(s, torch.ones(64))
    assert block.norm.weight[3] == 0
    assert block.norm.weight[5] == -1
    assert torch.equal(block.linear.weight, weight)


def test_a_channel_whose_factor_would_overflow_keeps_its_scale() -> None:
    block = Gemma(torch.float16)
    with torch.no_grad():
        block.norm.weight[7] = 500.0
    s = apply_scale(block, ScaleGroup("norm", ("linear",), "norm"), torch.full((64,), 1 / 256))
    assert s[7] == 1
    assert block.norm.weight[7] == 500
    assert block.norm.weight.isfinite().all()


def test_biases_are_divided_too() -> None:
    torch.manual_seed(0)
    block = nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 4), "down": nn.Linear(4, 3)})
    nn.init.normal_(block["norm"].bias)

    def run(x: Tensor) -> Tensor:
        return block["down"](block["up"](block["norm"](x)).relu())

    x = torch.randn(5, 8)
    before = run(x)
    apply_scale(block, ScaleGroup("norm", ("up",), "norm"), torch.rand(8) + 0.1)
    apply_scale(block, ScaleGroup("up", ("down",), "linear"), torch.rand(4) + 0.1)
    torch.testing.assert_close(run(x), before)
