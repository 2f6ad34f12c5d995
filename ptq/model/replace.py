"""Putting one module in the place of another."""

from collections import defaultdict
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


def replace_module(model: nn.Module, name: str, new: nn.Module, *, alone: bool = False) -> None:
    """Put ``new`` in place of the module called ``name``, under every name that it has.

    Args:
        alone: it is known to have no other name, which saves the search for one.
    """
    if alone:
        parent, _, leaf = name.rpartition(".")
        _put(model, model.get_submodule(parent), leaf, new)
    else:
        replace_modules(model, {name: new})


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """:func:`replace_module` for many, in one pass over the model."""
    by_old = {model.get_submodule(name): module for name, module in new.items()}
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is not None and child in by_old:
                _put(model, parent, leaf, by_old[child])


def shared_modules(model: nn.Module) -> set[str]:
    """The names of modules that have several."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _put(model: nn.Module, parent: nn.Module, leaf: str, new: nn.Module) -> None:
    origin = stands_for(parent.get_submodule(leaf))
    if origin is not None and origin is not new:
        new.__dict__["stands_for"] = (origin,)
    setattr(parent, leaf, new)
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
