"""The reference: dequantize everything in float32 and multiply. Slow, and right by inspection."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import QuantizedWeight
from ptq.kernels.activations import Activation
from ptq.kernels.spec import LinearSpec


@dataclass(frozen=True)
class Reference:
    """Serves every spec."""

    name: str = "reference"
    integer: bool = False

    def supports(self, spec: LinearSpec) -> str | None:
        return None

    def declines(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
        return weight

    def linear(self, x: Activation, prepared: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.linear(x.dequantize(), prepared.dequantize()).to(dtype)

    def tolerance(self, spec: LinearSpec) -> float:
        return 0.0

    def extra_bytes(self, spec: LinearSpec) -> int:
        return 0
