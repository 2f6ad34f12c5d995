"""Float32 products by oneDNN against float64, and their gradients against torch's own."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq.core import FastProducts, product

_EPS = torch.finfo(torch.float32).eps


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bound(k: int) -> float:
    """Of a sum of k products of numbers below 5, however it is ordered."""
    return 2 * k * _EPS * 25


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (7, 33, 5), (64, 130, 48), (0, 8, 3)])
@pytest.mark.parametrize("layout", ["rows", "columns", "a part"])
def test_against_float64(m: int, k: int, n: int, layout: str) -> None:
    x, w = numbers(m, k), numbers(n, k, seed=1)
    if layout == "columns":
        x, w = x.T.contiguous().T, w.T.contiguous().T
    if layout == "a part":
        x, w = numbers(m, 2 * k)[:, ::2], numbers(n, k + 3, seed=1)[:, 3:]
    made = product(x, w)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), x.double() @ w.double().T, rtol=0, atol=bound(k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    x, w = numbers(3, 8).to(dtype), numbers(2, 8, seed=1).to(dtype)
    assert torch.equal(product(x, w), x @ w.T)
    with FastProducts():
        assert torch.equal(F.linear(x, w), F.linear(x, w))
        assert F.linear(x, w).dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x, slope = nn.Linear(24, 10, bias), numbers(2, 5, 24), numbers(2, 5, 10, seed=2)

    def run() -> list[Tensor]:
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(slope)
        assert given.grad is not None
        return [y.detach(), given.grad, *(p.grad.clone() for p in layer.parameters())]

    expected = run()
    with FastProducts():
        made = run()
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound(24))


@pytest.mark.parametrize("learned", ["weight", "bias", "x"])
def test_a_gradient_for_one_of_them_alone(learned: str) -> None:
    tensors = {"x": numbers(4, 6), "weight": numbers(3, 6, seed=1), "bias": numbers(3, seed=2)}
    tensors[learned].requires_grad_()

    def gradient() -> Tensor:
        y = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
        (made,) = torch.autograd.grad(y.square().sum(), tensors[learned])
        return made

    expected = gradient()
    with FastProducts():
        torch.testing.assert_close(gradient(), expected, rtol=0, atol=40 * bound(6))


def test_it_is_onednn_that_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing is gained; and where torch has no oneDNN, it is torch's own product."""
    layer, x = nn.Linear(8, 4), numbers(3, 8)

    def ops() -> set[str]:
        with torch.profiler.profile() as seen, FastProducts(), torch.no_grad():
            product(x, layer(x.new_ones(5, 8)).new_ones(2, 8))
            layer(x)
        return {event.key for event in seen.key_averages()}

    assert "mkldnn::_linear_pointwise" in ops()
    assert "aten::addmm" not in ops()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "mkldnn::_linear_pointwise" not in ops()


@pytest.mark.parametrize("tokens", [1, 7, 256, 300])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_causal_attention(tokens: int, groups: int) -> None:
    """Against torch's in float64."""
    q = numbers(2, tokens, 6, 8).transpose(1, 2)  # as models have it, not contiguous
    k, v = numbers(2, groups, tokens, 8, seed=1), numbers(2, groups, tokens, 8, seed=2)
    for scale in (None, 0.1):
        expected = F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=True, scale=scale, enable_gqa=True
        )
        with FastProducts(), torch.profiler.profile() as seen:
            made = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-5)
        assert "mkldnn::_linear_pointwise" in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("case", ["mask", "all", "longer keys", "gradient", "dropout"])
def test_other_attention_is_torchs(case: str) -> None:
    q, k, v = numbers(1, 2, 5, 8), numbers(1, 2, 5, 8, seed=1), numbers(1, 2, 5, 8, seed=2)
    more: dict[str, object] = {"is_causal": True}
    if case == "mask":
        more = {"attn_mask": torch.eye(5, dtype=torch.bool)}
    if case == "all":
        more = {}
    if case == "longer keys":
        k, v = numbers(1, 2, 9, 8, seed=1), numbers(1, 2, 9, 8, seed=2)
    if case == "gradient":
        q.requires_grad_()
    if case == "dropout":
        more["dropout_p"] = 1e-9

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **more)  # type: ignore[arg-type]

    with FastProducts():
        made = run()
    assert torch.equal(made, run())
    assert made.requires_grad == q.requires_grad
