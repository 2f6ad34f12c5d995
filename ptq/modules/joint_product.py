"""A layer's share of one product with the weights of several."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.kernels import Activation, Kernel


@dataclass(frozen=True)
class JointProduct:
    """One layer's share of a product.

    Args:
        prepared: the kernel's form of all the layers' weights, one below the other.
        columns: of the product, which are this layer's.
        rows, dtype: of the activations that the form is for.
    """

    kernel: Kernel
    prepared: Any
    columns: slice
    rows: int
    dtype: torch.dtype

    def serves(self, kernel: Kernel, x: Tensor) -> bool:
        """Whether this is the product of these rows by the kernel that the layer would take."""
        return x.shape[0] == self.rows and x.dtype == self.dtype and kernel is self.kernel

    def linear(self, x: Activation) -> Tensor:
        """The layer's own columns [M, N]."""
        return self.kernel.linear(x, self.prepared, self.dtype)[:, self.columns]
