"""Modules of other kinds that hold linear weights, as ``nn.Linear`` layers over the same memory.

transformers' ``Conv1D`` (GPT-2) holds the transposed weight; its fused experts hold the weights of
all experts of a block in one tensor. *Unfolding* puts what the rest of ptq knows in their place:
an ``nn.Linear``, or :class:`~ptq.model.experts.Experts`. *Folding* puts them back. What stands in
keeps ``stands_for``, the module that it stands for without its values, and what replaces it in turn
(a quantized layer) gets it.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from ptq.model.experts import Experts, is_fused_experts
from ptq.model.replace import replace_module, stands_for, take_place
from ptq.model.views import linear_over, without_values


def is_foldable(module: nn.Module) -> bool:
    """Whether linear layers can stand in for the module."""
    if is_parametrized(module) or "forward" in vars(module):
        return False
    return type(module) is Conv1D or is_fused_experts(module)


def stand_ins(model: nn.Module) -> dict[str, nn.Module]:
    """By name, what can stand in for modules of the model, over their memory.

    A module that shares a tensor with another one is left out.
    """
    found = {name: module for name, module in model.named_modules() if is_foldable(module)}
    owners = Counter(
        id(p) for m in (model.modules() if found else ()) for p in m._parameters.values()
    )
    return {
        name: Experts(module) if is_fused_experts(module) else _linear(module)
        for name, module in found.items()
        if all(owners[id(p)] == 1 for p in module._parameters.values() if p is not None)
    }


def _linear(conv: nn.Module) -> nn.Linear:
    assert isinstance(conv, Conv1D)
    linear = linear_over(conv.weight.detach().T, conv.bias.detach(), conv.weight.requires_grad)
    linear.__dict__["stands_for"] = (without_values(conv),)
    return linear


def unfold(model: nn.Module, layers: Collection[str] | None = None) -> None:
    """Put the stand-ins in place; no value is copied.

    Args:
        layers: names of linear layers as they are in the unfolded model: what holds none of them
            stays as it is.
    """
    for name, new in stand_ins(model).items():
        if name and (layers is None or _holds(name, layers)):
            replace_module(model, name, take_place(model.get_submodule(name), new))


def _holds(name: str, layers: Collection[str]) -> bool:
    return name in layers or any(layer.startswith(f"{name}.") for layer in layers)


def fold(model: nn.Module) -> list[str]:
    """Put back what stand-ins that are wholly float stand for, with the values they have now.

    Returns:
        Their names.
    """
    found = []
    for name, module in list(model.named_modules()):
        folded = _folded(module)
        if folded is not None and name:
            replace_module(model, name, take_place(module, folded))
            found.append(name)
    return found


def _folded(module: nn.Module) -> nn.Module | None:
    """What a stand-in stands for; None if it is quantized, or none."""
    if isinstance(module, Experts):
        return module.fused() if module.is_float else None
    conv = stands_for(module)
    if conv is None or type(module) is not nn.Linear:
        return None
    conv._parameters["weight"] = nn.Parameter(
        module.weight.detach().T.contiguous(), module.weight.requires_grad
    )
    conv._parameters["bias"] = module.bias
    return conv


@contextmanager
def unfolded(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[None]:
    """Within it, the model is unfolded as by :func:`unfold`; what is wholly float afterwards is
    folded again, and what is float in part has memory of its own."""
    unfold(model, layers)
    try:
        yield
    finally:
        fold(model)
        for module in model.modules():
            if isinstance(module, Experts):
                module.own_memory()


@contextmanager
def folded(module: nn.Module) -> Iterator[None]:
    """Within it, what is wholly float is folded, as the files of a float model have it."""
    names = fold(module)
    try:
        yield
    finally:
        unfold(module, names)
