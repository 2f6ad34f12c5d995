"""A float layer whose input is rotated, on its way to becoming a quantized one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptq.core import Rotation
from ptq.kernels import Activation
from ptq.modules.shared_input import SharedInput


class InputRotation:
    """The pre-hook that rotates what linear layers read; those of one input rotate it once.

    As a hook that is there before others, it shows them the rotated input.
    """

    def __init__(self, rotation: Rotation, readers: int) -> None:
        self.rotation = rotation
        self.shared = SharedInput(readers)
        self.handles: dict[nn.Linear, RemovableHandle] = {}

    def __call__(
        self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x: Tensor = arguments[0] if arguments else keywords["input"]
        made = self.shared.get(x, x.dtype, lambda: Activation(self.rotation(x)))
        return (made.values,), {}


@torch.no_grad()
def rotate_inputs(linears: list[nn.Linear]) -> None:
    """Let these layers, which read the same tensor, read it rotated; what they give stays the same.

    Args:
        linears: of equally many input channels; their weights are changed in place.
    """
    rotation = read_rotated(linears).rotation
    for linear in linears:
        linear.weight.copy_(rotation.weight(linear.weight))


def read_rotated(linears: list[nn.Linear]) -> InputRotation:
    """Let these layers read their input rotated, with the weights that they have."""
    hook = InputRotation(Rotation.of(linears[0].in_features), len(linears))
    for linear in linears:
        handle = linear.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        hook.handles[linear] = handle
    return hook


def input_rotation(linear: nn.Module) -> InputRotation | None:
    """The layer's hook, if its input is rotated."""
    hooks = linear._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, InputRotation)), None)


def remove_input_rotation(linear: nn.Linear) -> None:
    """Take the layer's hook off, if it has one; its weight stays as it is."""
    hook = input_rotation(linear)
    if hook is not None:
        hook.handles.pop(linear).remove()
