"""Layers that read the same tensor quantize it once: q, k and v; gate and up."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.kernels import Activation


@dataclass
class _Latest:
    """An activation, what it was made from, and how many layers are still to read it."""

    seen: "weakref.ref[Tensor]"
    key: tuple[object, ...]
    activation: Activation
    readers: int


class SharedInput:
    """Remembers the activation of one input until all the layers that share it have read it.

    It is the same input if it is the same tensor object with the same memory, shape and version
    counter, so a tensor that was changed in place is quantized again. Memory that changes behind
    torch's back (through numpy or ``.data``) is not noticed between two layers that share, only
    after the last one. Inference tensors have no version counter, and are never shared. Safe to
    use from several threads: what is remembered is replaced as a whole.

    Args:
        readers: layers that share.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._latest: _Latest | None = None

    def get(
        self, x: Tensor, codes: torch.dtype | None, make: Callable[[], Activation]
    ) -> Activation:
        """The activation of x with codes of a dtype: the remembered one, or a new one."""
        if torch.compiler.is_compiling() or x.is_inference():
            return make()
        key = (x._version, x.data_ptr(), x.shape, x.stride(), codes)
        latest = self._latest
        if latest is not None and latest.seen() is x and latest.key == key:
            latest.readers -= 1
            if latest.readers <= 0:
                self._latest = None
            return latest.activation
        activation = make()
        owner = weakref.ref(self)
        seen = weakref.ref(x, lambda gone: _forget(owner(), gone))
        self._latest = _Latest(seen, key, activation, self.readers - 1)
        return activation

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: what is remembered stays behind."""
        return {"readers": self.readers, "_latest": None}


def _forget(shared: SharedInput | None, gone: "weakref.ref[Tensor]") -> None:
    if shared is not None and shared._latest is not None and shared._latest.seen is gone:
        shared._latest = None
