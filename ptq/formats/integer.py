"""Two's-complement and unsigned integers of 2 to 8 bits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class IntFormat:
    """An integer number format.

    Args:
        bits: width of a code, 2 to 8.
        signed: two's complement (-2^(b-1) .. 2^(b-1)-1) or unsigned (0 .. 2^b-1).

    >>> IntFormat(4, signed=True).qmin, IntFormat(4, signed=True).qmax
    (-8, 7)
    """

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an integer format has 2 to 8 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def reach(self) -> tuple[float, float]:
        """The largest magnitudes below and above zero that a symmetric scale is chosen for: what
        is within half a step of an end has its code."""
        return self.qmax + 0.5 if self.signed else 0.5, self.qmax + 0.5

    def nearest(self, values: Tensor) -> Tensor:
        """The codes next to these values, in the values' own dtype; changed in place."""
        return values.round_().clamp_(self.qmin, self.qmax)

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that one unpacked code is held in."""
        return torch.int8 if self.signed else torch.uint8
