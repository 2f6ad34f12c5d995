"""A quantized layer beside the float layer that it stands for."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.errors import ModelError, UnsupportedError
from ptq.modules import QuantLinear
from ptq.sensitivity import Change, InputSpace, Part, change_of


@dataclass(frozen=True, eq=False)
class Suspect:
    """One layer that may have done damage.

    Args:
        name: in both models.
        own: the float weight [N, K].
        layer: the quantized layer.
        columns: float32 [K]: the quantized model's input of it is the float one's divided by this,
            as smoothing makes it; or None.
        rows: float32 [N]: its output likewise; or None.
    """

    name: str
    own: Tensor
    layer: QuantLinear
    columns: Tensor | None = None
    rows: Tensor | None = None
    space: InputSpace = field(init=False)
    """Where its codes are."""

    def __post_init__(self) -> None:
        scheme, columns = self.layer.scheme, self.layer.in_features
        space = InputSpace.of(scheme, columns, self.columns, self.layer.input_order)
        object.__setattr__(self, "space", space)

    @property
    def target(self) -> Tensor:
        """The float weight [N, K] that the codes stand for, float32."""
        weight = self.own.float() if self.space.plain else self.space.weight(self.own)
        return weight if self.rows is None else weight / self.rows[:, None]

    def change(self, part: Part) -> Change:
        """What this part of the layer does to the float model."""
        weight = self.layer.quantized_weight
        made = change_of(weight, self.layer.scheme, self.own, part, self.space)
        if part == "activations":
            return made
        assert made.weight is not None
        bias = self.layer.bias
        if self.rows is None:
            return Change(made.weight, made.read, bias)
        scaled = None if bias is None else bias * self.rows
        return Change(made.weight * self.rows[:, None], made.read, scaled)


def pair(model: nn.Module, quantized: nn.Module) -> list[Suspect]:
    """Every quantized layer with the float one of its name, in the model's order.

    Args:
        model: float and unfolded.

    Raises:
        ModelError: a layer is missing in the float model, or has another shape.
        UnsupportedError: the quantized model has no quantized layer.
    """
    found = []
    layers = dict(model.named_modules())
    for name, layer in quantized.named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        linear = layers.get(name)
        shape = (layer.out_features, layer.in_features)
        if type(linear) is not nn.Linear or tuple(linear.weight.shape) != shape:
            there = "none" if linear is None else f"{type(linear).__name__}"
            if isinstance(linear, nn.Linear):
                there = f"{list(linear.weight.shape)}"
            raise ModelError(
                f"layer {name} {list(shape)} is quantized, the float model has {there} there: "
                "they are not the same model"
            )
        found.append(Suspect(name, linear.weight.detach(), layer))
    if not found:
        raise UnsupportedError(
            f"{type(quantized).__name__} has no quantized linear layer, so there is nothing to "
            "diagnose"
        )
    return found


def decibels(signal: float, noise: float) -> float | None:
    """``10 log10(signal / noise)``; None where there is no noise or no signal."""
    if noise <= 0 or signal <= 0:
        return None
    return 10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)).item()
