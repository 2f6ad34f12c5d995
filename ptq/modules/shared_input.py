"""Layers that read the same tensor quantize it once: q, k and v; gate and up."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptq.kernels import Activation


class SharedInput:
    """Remembers the activation made from the latest input while that input is alive.

    It is the same input if it is the same tensor object with the same version counter, so a tensor
    that was changed in place is quantized again. Inference tensors have no such counter, and are
    never shared. Safe to use from several threads: what is remembered is replaced as a whole.
    """

    def __init__(self) -> None:
        self._latest: tuple[weakref.ref[Tensor], int, torch.dtype, Activation] | None = None

    def get(self, x: Tensor, codes: torch.dtype, make: Callable[[], Activation]) -> Activation:
        """The activation of x with codes of a dtype: the remembered one, or a new one."""
        if torch.compiler.is_compiling() or x.is_inference():
            return make()
        latest = self._latest
        if latest is not None:
            seen, version, dtype, activation = latest
            if seen() is x and version == x._version and dtype == codes:
                return activation
        activation = make()
        self._latest = (weakref.ref(x, self._forget), x._version, codes, activation)
        return activation

    def _forget(self, seen: "weakref.ref[Tensor]") -> None:
        if self._latest is not None and self._latest[0] is seen:
            self._latest = None

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: what is remembered stays behind."""
        return {"_latest": None}
