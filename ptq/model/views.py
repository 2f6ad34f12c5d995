"""Linear layers over the memory of another module's parameters."""

import copy

from torch import Tensor, nn


def linear_over(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    """A linear layer of these very tensors, [out, in] and [out]."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad)
    return linear


def without_values(module: nn.Module) -> nn.Module:
    """A copy whose own parameters are on the meta device; everything else is shared."""
    made = copy.copy(module)
    made._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for name, p in module._parameters.items()
    }
    return made
