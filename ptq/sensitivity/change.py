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

Part = Literal["weights", "activations", "both"]
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Change:
    """A float layer's stand-in for what quantizing does to it.

    Args:
        weight: float [N, K] in place of the layer's own, or None.
        read: makes of the layer's input [..., K] what it reads instead, or None.
        bias: float [N] in place of the layer's own, or None.
    """

    weight: Tensor | None = None
    read: Read | None = None
    bias: Tensor | None = None


@contextmanager
def changed(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Within it, the named ``nn.Linear`` layers are changed; afterwards, whatever happens, each has
    its very own parameters again. A layer whose weight is tied to another module's leaves that one
    as it is. A weight is held in the layer's dtype: only float32 holds all of int8's exactly."""
    layers = {name: model.get_submodule(name) for name in changes}
    own = {name: dict(layer._parameters) for name, layer in layers.items()}
    handles = []
    try:
        for name, change in changes.items():
            for key, value in (("weight", change.weight), ("bias", change.bias)):
                if value is not None:
                    held = value.to(own[name]["weight"])
                    layers[name]._parameters[key] = nn.Parameter(held, requires_grad=False)
            if change.read is not None:
                handles.append(layers[name].register_forward_pre_hook(_hook(change.read)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameters in own.items():
            layers[name]._parameters.update(parameters)


def _hook(read: Read) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    return lambda _, arguments: (read(arguments[0]),)


@dataclass(frozen=True, eq=False)
class InputSpace:
    """The coordinates in which a layer's input is rounded: its channels divided by a scale, then
    rotated, then sorted.

    Args:
        scale: float32 [K], or None for ones.
        order: int [K], a permutation, or None.
    """

    rotation: Rotation | None = None
    scale: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(
        cls,
        scheme: Scheme,
        columns: int,
        scale: Tensor | None = None,
        order: Tensor | None = None,
    ) -> "InputSpace":
        """That of a scheme, for a layer with so many input channels."""
        rotation = None if scheme.input_rotation is None else Rotation.of(columns)
        return cls(rotation, scale, None if order is None else order.long())

    @property
    def plain(self) -> bool:
        """The input is rounded as it is."""
        return self.rotation is None and self.scale is None and self.order is None

    def enter(self, rows: Tensor) -> Tensor:
        """The input [R, K] in these coordinates."""
        rows = rows if self.scale is None else rows / self.scale.to(rows)
        rows = rows if self.rotation is None else self.rotation(rows)
        return rows if self.order is None else rows[:, self.order]

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [N, K] that goes with them, float32."""
        weight = weight.float() if self.scale is None else weight.float() * self.scale
        weight = weight if self.rotation is None else self.rotation.weight(weight)
        return weight if self.order is None else weight[:, self.order]

    def restored(self, weight: Tensor) -> Tensor:
        """The weight [N, K] of the layer's own input, float32."""
        weight = weight.float()
        weight = weight if self.order is None else weight[:, self.order.argsort()]
        weight = weight if self.rotation is None else self.rotation.restored(weight)
        return weight if self.scale is None else weight / self.scale


def change_of(
    quantized: QuantizedWeight,
    scheme: Scheme,
    own: Tensor,
    part: Part,
    space: InputSpace | None = None,
) -> Change:
    """What this part of a quantized layer does.

    Args:
        quantized: the codes [N, K], with the input's static scale if the scheme has one.
        own: the float weight [N, K], which stays where the weights are not the part.
        space: where the codes and the input are (default: as the scheme says).
    """
    space = space or InputSpace.of(scheme, own.shape[1], order=quantized.input_order)
    if scheme.activations is None and part == "activations":
        return Change()
    if scheme.activations is None or part == "weights":
        return Change(space.restored(quantized.dequantize()))
    scale, zero_point = quantized.input_scale, quantized.input_zero_point
    read = read_in(space, lambda rows: round_trip(rows, scheme.activations, scale, zero_point))
    if part == "both":
        return Change(quantized.dequantize(), read)
    return Change(None if space.plain else space.weight(own), read)


def read_in(space: InputSpace, rounded: Callable[[Tensor], Tensor]) -> Read:
    """What a layer reads whose input is changed in these coordinates.

    Args:
        rounded: makes of rows [R, K] float rows.
    """

    def read(x: Tensor) -> Tensor:
        rows = space.enter(x.reshape(-1, x.shape[-1]))
        return rounded(rows).to(x.dtype).reshape(x.shape)

    return read


def round_trip(
    rows: Tensor,
    scheme: ActivationScheme | None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Rows [R, K] as the codes of a scheme hold them, float32; as they are without a scheme.

    Args:
        scale, zero_point: scalars, of static activations.
    """
    return quantize_activation(rows, scheme, scale, zero_point, torch.float32).dequantize()
