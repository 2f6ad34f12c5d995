"""A float model's linear layers and its attention by :func:`ptq.core.product`'s library."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ptq.core.product import onednn, product, served

_ROWS = 256  # queries of a head that are scored at once


class FastProducts(TorchFunctionMode):
    """Within it linear layers go this way, their gradients too, and causal attention without a
    gradient: for those who run many tokens in float32 on a CPU. Values differ by rounding."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and served(args[0], args[1]):
            return _linear(*args)
        if func is F.scaled_dot_product_attention and len(args) == 3:
            query, key, value = args
            given = kwargs or {}
            if _plainly_causal(args, given):
                return causal_attention(query, key, value, given.get("scale"))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _learned(*(t for t in (x, weight, bias) if t is not None)):
        made: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return made
    return onednn(x, weight, bias)


def _learned(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


class _Linear(torch.autograd.Function):
    """A linear layer [..., K] -> [..., N] and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = slope.reshape(-1, slope.shape[-1])
        return (
            product(rows, weight.T).reshape(x.shape) if of_x else None,
            product(rows.T, x.reshape(-1, x.shape[-1]).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _plainly_causal(tensors: Sequence[Tensor], given: Mapping[str, Any]) -> bool:
    query, key, value = tensors
    return (
        bool(given.get("is_causal"))
        and given.get("attn_mask") is None
        and not given.get("dropout_p")
        and query.ndim == key.ndim == value.ndim == 4
        and query.shape[2] == key.shape[2]
        and query.shape[1] % key.shape[1] == 0
        and served(query, key, value)
        and not _learned(query, key, value)
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Each token's attention to itself and those before it: [B, H, T, V].

    Args:
        query: [B, H, T, D].
        key, value: [B, G, T, D] and [B, G, T, V]; the heads of a query share them in groups, in
            order.
        scale: of the scores (default: ``1 / sqrt(D)``).
    """
    batch, heads, tokens, width = query.shape
    groups, shared = key.shape[1], heads // key.shape[1]
    query = query * (1 / math.sqrt(width) if scale is None else scale)
    out = query.new_empty(batch, heads, tokens, value.shape[-1])
    later = torch.ones(_ROWS, _ROWS, dtype=torch.bool).triu_(1)
    for b in range(batch):
        for g in range(groups):
            mine = slice(g * shared, (g + 1) * shared)
            values = value[b, g].T.contiguous()
            for start in range(0, tokens, _ROWS):
                end = min(start + _ROWS, tokens)
                rows = end - start
                asked = query[b, mine, start:end].reshape(shared * rows, width)
                scores = product(asked, key[b, g, :end])
                ahead = scores.view(shared, rows, end)[:, :, start:]
                ahead.masked_fill_(later[:rows, :rows], -math.inf)
                given = product(scores.softmax(-1), values[:, :end])
                out[b, mine, start:end] = given.view(shared, rows, -1)
    return out
