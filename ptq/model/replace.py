"""Putting one module in the place of another."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in place of the module called ``name``, under every name that it has."""
    replace_modules(model, {name: new})


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """:func:`replace_module` for many, in one pass over the model."""
    by_old = {model.get_submodule(name): module for name, module in new.items()}
    for old, module in by_old.items():
        origin = stands_for(old)
        if origin is not None and origin is not module:
            module.__dict__["stands_for"] = (origin,)
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is not None and child in by_old:
                setattr(parent, leaf, by_old[child])
                _leave_fast_path(model, parent)


def take_place(old: nn.Module, new: M) -> M:
    """The new module with the mode and the hooks of the old one."""
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    return new.train(old.training)


def stands_for(module: nn.Module) -> nn.Module | None:
    """The module of another kind, without values, whose place this one has."""
    found: tuple[nn.Module, ...] = module.__dict__.get("stands_for", ())
    return found[0] if found else None


def _leave_fast_path(model: nn.Module, parent: nn.Module) -> None:
    """torch's fused encoder layer would read float weights and never call the new layer."""
    if not isinstance(parent, nn.TransformerEncoderLayer):
        return
    parent.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
