"""Floating-point numbers of 8 bits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point number format of 8 bits, without infinities.

    A weight holds the bytes of its codes as int8, so that nothing takes them for numbers to cast.

    Args:
        dtype: of the codes, torch's own.

    >>> FLOAT8.name, FLOAT8.qmax
    ('float8_e4m3fn', 448.0)
    """

    dtype: torch.dtype
    bits: int = 8
    signed: bool = True

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def qmin(self) -> float:
        return -self.qmax

    @property
    def qmax(self) -> float:
        return torch.finfo(self.dtype).max

    @property
    def reach(self) -> tuple[float, float]:
        """The largest magnitudes below and above zero that a symmetric scale is chosen for."""
        return self.qmax, self.qmax

    def nearest(self, values: Tensor) -> Tensor:
        """The codes next to these values, in the values' own (wider) dtype; changed in place."""
        return values.copy_(values.clamp_(self.qmin, self.qmax).to(self.dtype))


FLOAT8 = FloatFormat(torch.float8_e4m3fn)
"""Four bits of exponent, three of mantissa (Micikevicius et al. 2022, "FP8 Formats for Deep
Learning", arXiv 2209.05433)."""
