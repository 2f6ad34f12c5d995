"""QuantLinear: a linear layer whose buffers are the canonical quantized weight."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptq.config import Scheme
from ptq.core import QuantizedWeight, Rotation, is_exporting
from ptq.kernels import (
    Activation,
    Kernel,
    LinearSpec,
    Reference,
    quantize_activation,
    rotated,
    select,
)
from ptq.modules.buffers import empty_weight, held_weight, kept_scales, register, share
from ptq.modules.joint_product import JointProduct
from ptq.modules.shared_input import SharedInput


class QuantLinear(nn.Module):
    """``y = x W^T + b`` with W stored as integer codes.

    The buffers are the :class:`~ptq.core.QuantizedWeight`, so ``state_dict()`` is what a
    checkpoint holds. ``.to(dtype)`` changes the bias and leaves codes and scales as they are;
    the output has the dtype of the input. For inference: no gradient flows through it.

    Args:
        weight: the quantized weight [out_features, in_features].
        scheme: the scheme it was quantized with.
        bias: [out_features], floating point, or None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_order: Tensor | None

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme = scheme
        register(self, weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        rotated = scheme.input_rotation is not None
        self.rotation = Rotation.of(self.in_features) if rotated else None
        # The input goes to the kernel as it is; asking a buffer takes a microsecond of each call.
        self._plain_input = (
            not rotated and scheme.activations is None and weight.input_order is None
        )
        self.shared_input: SharedInput | None = None
        self.joint: JointProduct | None = None  # in compiled graphs
        self.releases = 0  # how often forms of the weight were forgotten
        self.tied_to: tuple[nn.Module, ...] = ()  # a tuple: the owner is no submodule
        self._prepared: dict[tuple[str, str], Any] = {}
        self._choice: dict[tuple[str, torch.dtype, int], tuple[Kernel, Any]] = {}
        self.tuned: dict[tuple[str, torch.dtype], tuple[tuple[int, Kernel], ...]] = {}

    @classmethod
    def on_meta(
        cls, in_features: int, out_features: int, scheme: Scheme, bias: torch.dtype | None
    ) -> "QuantLinear":
        """An empty layer of the right shapes and dtypes on the meta device, to be loaded into.

        Args:
            bias: dtype of the bias, or None for no bias.
        """
        weight = empty_weight(out_features, in_features, scheme)
        empty = None if bias is None else torch.empty(out_features, dtype=bias, device="meta")
        return cls(weight, scheme, empty)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The buffers as a value; nothing is copied."""
        return held_weight(self, self.scheme, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """The float weight [out_features, in_features], dequantized anew at every access.

        For code that looks at ``linear.weight``; in the dtype of the bias, else float32.
        """
        return self.float_weight(torch.float32 if self.bias is None else self.bias.dtype)

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for: the weight [out_features, in_features] of an ``nn.Linear``."""
        held = self.quantized_weight
        weight = held.restored(held.dequantize(dtype if self.rotation is None else torch.float32))
        return weight if self.rotation is None else self.rotation.restored(weight).to(dtype)

    def spec(self, device: str, dtype: torch.dtype, m: int) -> LinearSpec:
        """What a kernel is asked for m rows in this dtype."""
        return LinearSpec.of(self.quantized_weight, self.scheme.activations, device, dtype, m)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of x."""
        return self.run(x, None)

    def run(self, x: Tensor, kernel: Kernel | None) -> Tensor:
        """The forward pass by a given kernel (None: the chosen one)."""
        rows = x.detach() if x.requires_grad else x
        flat = x.dim() == 2 and x.shape[1] == self.in_features
        rows = rows if flat else rows.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            y = self._product_in_graph(x, rows, kernel)
        else:
            y = self._product(x, rows, *self._chosen(rows, kernel))
        if self.bias is not None:
            y = y.add_(self.bias)
        return y if flat else y.view(*x.shape[:-1], self.out_features)

    def _chosen(self, rows: Tensor, kernel: Kernel | None) -> tuple[Kernel, Any]:
        """The kernel for so many rows, looked up once, or the given one; and its form of W."""
        if kernel is not None:
            return kernel, self.prepared(kernel, rows.dtype)
        key = rows.device.type, rows.dtype, rows.shape[0]
        chosen = self._choice.get(key)
        if chosen is None:
            found = self.kernel(rows)
            chosen = self._choice[key] = found, self.prepared(found, rows.dtype)
        return chosen

    def _product(self, x: Tensor, rows: Tensor, kernel: Kernel, prepared: Any) -> Tensor:
        """``rows W^T`` in the dtype of x."""
        return kernel.linear(self._activation(x, rows, kernel), prepared, x.dtype)

    def _product_in_graph(self, x: Tensor, rows: Tensor, kernel: Kernel | None) -> Tensor:
        kernel = kernel or self.kernel(rows)
        if self.joint is not None and self.joint.serves(kernel, rows):
            return self.joint.linear(self._activation(x, rows, kernel))
        return self._product(x, rows, kernel, self.prepared(kernel, rows.dtype))

    def _activation(self, x: Tensor, rows: Tensor, kernel: Kernel) -> Activation:
        """x as the kernel wants it: float, or codes, which siblings may have made."""
        if self._plain_input:
            return Activation(rows)
        codes = None if kernel.integer else _float_codes(x.dtype)  # None: the format's own
        make = partial(self._new_activation, rows, codes)
        return make() if self.shared_input is None else self.shared_input.get(x, codes, make)

    def _new_activation(self, rows: Tensor, codes: torch.dtype | None) -> Activation:
        rows = rows if self.rotation is None else rotated(rows, self.rotation)
        rows = rows if self.input_order is None else rows.index_select(1, self.input_order)
        scheme = self.scheme.activations
        return quantize_activation(rows, scheme, self.input_scale, self.input_zero_point, codes)

    def kernel(self, rows: Tensor) -> Kernel:
        """The kernel for this many rows: the measured choice, or the rule of thumb."""
        if is_exporting():  # one graph for any number of rows, of torch's plain ops
            return Reference()
        key = rows.device.type, rows.dtype, rows.shape[0]
        if torch.compiler.is_compiling():  # a look-up by the number would fix the number
            return select(self.spec(*key))
        tuned = self.tuned.get(key[:2], ())
        kernel = next((k for first, k in reversed(tuned) if first <= key[2]), None)
        return kernel or select(self.spec(*key))

    def prepared(self, kernel: Kernel, dtype: torch.dtype) -> Any:
        """The kernel's own form of the weight, made once."""
        if is_exporting():  # of fake tensors, and not to be saved as a constant
            return kernel.prepare(self.quantized_weight, dtype)
        key = kernel.name, str(dtype)  # the compiler cannot name a dtype as a key
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = kernel.prepare(self.quantized_weight, dtype)
            self._prepared[key] = prepared
        return prepared

    def tune(self, device: str, dtype: torch.dtype, choice: tuple[tuple[int, Kernel], ...]) -> None:
        """Use measured kernels from now on.

        Args:
            choice: (first row, kernel) in ascending order, from 1; empty for the rule of thumb.
        """
        self.tuned[device, dtype] = choice
        self.release()

    def release(self) -> None:
        """Forget the kernels' own forms of the weight; they are made again when needed."""
        self.releases += 1
        self.joint = None
        self._prepared.clear()
        self._choice.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """``.to()``, ``.half()``, ``.cuda()``: scales follow the device but keep their dtype."""
        with kept_scales(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.tied_to:
            share(self.tied_to[0], self)
        self.release()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: the prepared forms belong to this process and stay behind."""
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_prepared": {}, "_choice": {}, "joint": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}"
        )


def _float_codes(dtype: torch.dtype) -> torch.dtype:
    """A dtype that holds all codes exactly and that the float kernels take as it is."""
    return torch.float32 if dtype == torch.float16 else dtype
