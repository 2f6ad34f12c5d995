"""Rotation of vectors by Hadamard matrices, computed as two small products."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptq.core.exporting import is_exporting
from ptq.core.hadamard import hadamard, orders_dividing
from ptq.errors import UnsupportedError

_LARGEST = 256  # of a factor, whose order is what it costs


@dataclass(eq=False)
class Rotation:
    """``x [..., size]`` to ``x R``, which spreads every channel evenly over ``order`` channels.

    R is ``2^-k`` times a Hadamard matrix, repeated along the diagonal: the Kronecker product of two
    (of order 256 at most), the largest whose order divides the size. So an element takes
    ``left + right`` multiplications instead of ``order`` (Ashkboos et al. 2024, "QuaRot", arXiv
    2404.00456, section 3). ``2^k`` is the power of two nearest to ``sqrt(order)``: the entries are
    exact in every dtype, and R is orthogonal up to a factor.

    >>> Rotation.of(1536)
    Rotation(size=1536, left=32, right=48)
    """

    size: int
    left: int
    right: int
    _made: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def of(cls, size: int, within: int | None = None) -> "Rotation":
        """The rotation of this many channels.

        Args:
            within: so many consecutive channels are mixed only with each other, such as those of
                a head of an attention; a divisor of size.

        Raises:
            UnsupportedError: size is not positive, or within does not divide it.
        """
        if size < 1:
            raise UnsupportedError(f"a rotation of {size} channels was asked for; give at least 1")
        part = size if within is None else within
        if part < 1 or size % part:
            raise UnsupportedError(f"{size} channels are no multiple of {part} to be mixed within")
        orders = [order for order in orders_dividing(part) if order <= _LARGEST]
        pairs = [(a, b) for a in orders for b in orders if a <= b and part % (a * b) == 0]
        return cls(size, *max(pairs, key=lambda pair: (pair[0] * pair[1], -sum(pair))))

    @property
    def order(self) -> int:
        """Channels that are mixed with each other; 1 where there is nothing to rotate."""
        return self.left * self.right

    @property
    def _exponent(self) -> int:
        return round(math.log2(self.order) / 2)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """L [left, left] and M [right, right], of which R repeats the Kronecker product along its
        diagonal: of a piece of x, seen as [left, right], ``x R`` is ``L^T piece M``. On x's device,
        float32 or float64."""
        # Not in 16 bits: such small products are up to 50 times slower on a CPU, and less exact.
        key = (x.device, torch.promote_types(x.dtype, torch.float32))
        made = self._made.get(key)
        if made is None:
            left, right = hadamard(self.left), hadamard(self.right) * 0.5**self._exponent
            made = (left.to(*key), right.to(*key))
            if not is_exporting():  # they would be fake tensors
                self._made[key] = made
        return made

    def __call__(self, x: Tensor) -> Tensor:
        """``x R`` in the dtype of x."""
        left, right = self.factors(x)
        return self._apply(x, left.T, right)

    def transposed(self, x: Tensor) -> Tensor:
        """``x R^T`` in the dtype of x."""
        left, right = self.factors(x)
        return self._apply(x, left, right.T)

    def _apply(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        parts = x.to(left.dtype).reshape(-1, self.left, self.right)
        mixed = torch.matmul(left, torch.matmul(parts, right))
        return mixed.reshape(x.shape).to(x.dtype)

    def weight(self, weight: Tensor) -> Tensor:
        """W' [N, size] with ``(x R) W'^T = x W^T``: ``W R / (order / 4^k)``, computed in float32,
        in the dtype of W."""
        factor = 4.0**self._exponent / self.order
        return self(weight.float()).mul_(factor).to(weight.dtype)

    def restored(self, weight: Tensor) -> Tensor:
        """W [N, size] of a W'; computed in float32, in the dtype of W'."""
        return self.transposed(weight.float()).to(weight.dtype)
