"""What a quantized layer does, done to the float layer: another weight, a rounded input."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ptq.config import ActivationScheme, Scheme
from ptq.core import QuantizedWeight, Rotation
from ptq.kernels import quantize_activation
from ptq.modules import QuantLinear

Part = Literal["weights", "activations", "both"]
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Change:
    """A float layer's stand-in for what quantizing does to it.

    Args:
        weight: float [N, K] in place of the layer's own, or None.
        read: makes of the layer's input [..., K] what it reads instead, or None.
    """

    weight: Tensor | None = None
    read: Read | None = None


@contextmanager
def changed(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Within it, the named ``nn.Linear`` layers are changed; afterwards, whatever happens, each has
    its very own parameter again. A layer whose weight is tied to another module's leaves that one
    as it is. A weight is held in the layer's dtype: only float32 holds all of int8's exactly."""
    own = {name: model.get_submodule(name)._parameters["weight"] for name in changes}
    handles = []
    try:
        for name, change in changes.items():
            layer = model.get_submodule(name)
            if change.weight is not None:
                held = change.weight.to(own[name])
                layer._parameters["weight"] = nn.Parameter(held, requires_grad=False)
            if change.read is not None:
                handles.append(layer.register_forward_pre_hook(_hook(change.read)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in own.items():
            model.get_submodule(name)._parameters["weight"] = weight


def _hook(read: Read) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    return lambda _, arguments: (read(arguments[0]),)


def change_of(quantized: QuantizedWeight, scheme: Scheme, own: Tensor, part: Part) -> Change:
    """What this part of a quantized layer does.

    Args:
        quantized: the codes [N, K], with the input's static scale if the scheme has one.
        own: the float weight [N, K], which stays where the weights are not the part.
    """
    rotation = None if scheme.input_rotation is None else Rotation.of(own.shape[1])
    rounds = part != "weights" and scheme.activations is not None
    if not rounds:
        if part == "activations":
            return Change()
        weight = quantized.dequantize()
        return Change(weight if rotation is None else rotation.restored(weight))
    read = rounded_input(scheme, quantized.input_scale, quantized.input_zero_point)
    if part == "both":
        return Change(quantized.dequantize(), read)
    return Change(None if rotation is None else rotation.weight(own.float()), read)


def change_of_layer(layer: QuantLinear, own: Tensor, part: Part) -> Change:
    """What a quantized layer does in place of the float one with this weight."""
    return change_of(layer.quantized_weight, layer.scheme, own, part)


def rounded_input(scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None) -> Read:
    """The input as the scheme's codes hold it, rotated if the scheme rotates it.

    Args:
        scale, zero_point: scalars, of static activations.
    """
    activations = scheme.activations
    assert activations is not None

    def read(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if scheme.input_rotation is not None:
            rows = Rotation.of(rows.shape[1])(rows)
        return round_trip(rows, activations, scale, zero_point).to(x.dtype).reshape(x.shape)

    return read


def round_trip(
    rows: Tensor,
    scheme: ActivationScheme,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Rows [R, K] as their codes hold them, float32."""
    return quantize_activation(rows, scheme, scale, zero_point, torch.float32).dequantize()
