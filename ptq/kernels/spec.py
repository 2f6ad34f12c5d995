"""What a kernel is asked to do, and what it must offer."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ptq.config import ActivationScheme
from ptq.core import Granularity, QuantizedWeight
from ptq.formats import Format
from ptq.kernels.activations import Activation

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""dtypes of activations that the ops take; the reference takes any."""


@dataclass(frozen=True)
class LinearSpec:
    """One quantized matrix product y[M, N] = x[M, K] W[N, K]^T, without its values.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: dtype of x and y.
        symmetric: the weight has no zero point.
        activations: None where x stays in float.
    """

    device: str
    dtype: torch.dtype
    format: Format
    granularity: Granularity
    symmetric: bool
    activations: ActivationScheme | None
    n: int
    k: int
    m: int

    @classmethod
    def of(
        cls,
        weight: QuantizedWeight,
        activations: ActivationScheme | None,
        device: str,
        dtype: torch.dtype,
        m: int,
    ) -> "LinearSpec":
        """The spec of a product with this weight."""
        return cls(
            device,
            dtype,
            weight.format,
            weight.granularity,
            weight.zero_point is None,
            activations,
            weight.shape[0],
            weight.shape[1],
            m,
        )

    def with_rows(self, m: int) -> "LinearSpec":
        return replace(self, m=m)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"[{self.m}, {self.k}] x [{self.n}, {self.k}]^T, {dtype} on {self.device}, "
            f"{self.format.name} {self.granularity} weights"
        )


def floats_reason(spec: LinearSpec) -> str | None:
    """Why the activations' dtype does not fit the ops."""
    if spec.dtype not in FLOATS:
        return f"for {', '.join(str(dtype) for dtype in FLOATS)} activations"
    return None


def int8_reason(spec: LinearSpec) -> str | None:
    """Why the weight does not fit an op over plain int8 codes with a scale for each row."""
    if spec.format.name != "int8" or spec.granularity.kind == "group" or not spec.symmetric:
        return "for symmetric int8 codes with per-channel or per-tensor scales"
    return None


LARGE = 1 << 22
"""Weights of a layer from which on a kernel for few rows is slower sooner."""


def few_rows(spec: LinearSpec, limit: int, limit_of_large: int | None = None) -> str | None:
    """The rule of thumb of kernels that are good for a few rows; for fewer of large weights."""
    if limit_of_large is not None and spec.n * spec.k >= LARGE:
        limit = limit_of_large
    return f"more than {limit} rows: slower than dequantizing" if spec.m > limit else None


def second_form(extra: int) -> str:
    """Why a kernel that keeps a whole weight of its own is not chosen by rule of thumb."""
    return f"keeps a second weight of {extra / 1e6:.1f} MB: ptq.tune may allow it"


class Kernel(Protocol):
    """A way to compute a quantized linear layer.

    ``prepare`` is called once per weight and ``linear`` many times; what ``prepare`` returns is
    private to the kernel, lives as long as the layer, and is never saved.
    """

    @property
    def name(self) -> str: ...

    @property
    def integer(self) -> bool:
        """Whether ``linear`` wants quantized activations as codes in their format's dtype, int8 or
        float8 (else as the same codes in a wider float dtype)."""
        ...

    def supports(self, spec: LinearSpec) -> str | None:
        """None if the kernel can serve the spec, else why it cannot."""
        ...

    def declines(self, spec: LinearSpec) -> str | None:
        """None, or why a kernel after this one in the list is expected to be faster: a rule of
        thumb, which measuring (:func:`ptq.tune`) replaces."""
        ...

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> Any:
        """The form of the weight that ``linear`` reads, for activations of ``dtype``."""
        ...

    def linear(self, x: Activation, prepared: Any, dtype: torch.dtype) -> Tensor:
        """y [M, N] in ``dtype`` for x [M, K]; no bias."""
        ...

    def tolerance(self, spec: LinearSpec) -> float:
        """Largest relative error against the reference kernel, as a multiple of the norm
        ``|x| |W|^T`` of each output: the rounding that the kernel's own dtypes cause."""
        ...

    def extra_bytes(self, spec: LinearSpec) -> int:
        """Bytes that the prepared form holds beyond the canonical weight."""
        ...
