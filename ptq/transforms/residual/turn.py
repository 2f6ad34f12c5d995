"""An orthogonal matrix, and weights that read or write what it has turned."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from ptq.core import Rotation
from ptq.errors import UnsupportedError

_AT_ONCE = 1 << 23  # elements that are held in float32


@dataclass(frozen=True, eq=False)
class Turn:
    """``x [..., size]`` to ``x Q``: random signs, then a Hadamard matrix, of length one.

    Args:
        rotation: the matrix, orthogonal up to a factor.
        signs: float32 [size] of 1 and -1.
    """

    rotation: Rotation
    signs: Tensor

    @classmethod
    def of(cls, size: int, seed: int) -> Self:
        """The matrix of this size and seed.

        Raises:
            UnsupportedError: no Hadamard matrix divides the size.
        """
        rotation = Rotation.of(size)
        if rotation.order == 1:
            raise UnsupportedError(
                f"residual_rotation: there is no Hadamard matrix for {size} channels; leave it out"
            )
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1.0
        return cls(rotation, signs)

    def __call__(self, x: Tensor) -> Tensor:
        """``x Q`` in float32."""
        return self.rotation.weight(x.float() * self.signs.to(x.device)).mul_(self._length)

    def back(self, x: Tensor) -> Tensor:
        """``x Q^T`` in float32."""
        turned = self.rotation.transposed(x.float()).div_(self._length)
        return turned.mul_(self.signs.to(x.device))

    @property
    def _length(self) -> float:
        """Of a row of the rotation, whose entries are 1 and -1 times a power of two."""
        row = torch.zeros(self.rotation.size)
        row[0] = 1
        return float(self.rotation(row).norm())

    def __str__(self) -> str:
        return f"{self.rotation.left} x {self.rotation.right}"


@torch.no_grad()
def turn_columns(weight: Tensor, turn: Turn, factor: Tensor | None = None) -> None:
    """Replace W [N, K] by ``W diag(factor) Q``, in place: for what reads the stream."""
    for rows in torch.split(weight, max(1, _AT_ONCE // weight.shape[1])):
        rows.copy_(turn(rows if factor is None else rows.float() * factor))


@torch.no_grad()
def turn_outputs(linear: nn.Linear, turn: Turn) -> None:
    """Let a layer give ``y Q`` where it gave y [..., N], in place: for what writes the stream."""
    for columns in torch.split(linear.weight, max(1, _AT_ONCE // linear.out_features), 1):
        columns.copy_(turn(columns.T).T)
    if linear.bias is not None:
        linear.bias.copy_(turn(linear.bias))
