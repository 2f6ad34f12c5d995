"""Where a layer's change is looked at: the output of the module that the layer is part of.

Behind an attention its queries, keys and values have met other tokens and the softmax, and what
their change does there is local again: the product with that output's gradient has the attention's
part of it exactly, however large the change is, and only what is behind is to first order.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import ModelError, UnsupportedError
from ptq.model import block_lists
from ptq.sensitivity.change import Change, changed
from ptq.transforms.calls import mapped


@dataclass(eq=False)
class _Call:
    """One call of a module.

    Args:
        gradients: of its output [..., N], by backward pass.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    gradients: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Place:
    """A module, and the layers whose changes are looked at behind it.

    Args:
        layers: names within the module; an empty one is the module itself.
        calls: of the current run.
    """

    name: str
    module: nn.Module
    layers: list[str]
    calls: list[_Call] = field(default_factory=list)

    def full_name(self, layer: str) -> str:
        return f"{self.name}.{layer}" if layer else self.name

    @torch.no_grad()
    def products(
        self, changes: Callable[[str], Iterable[Change]]
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """What each change makes of the output, times its gradient.

        The module runs again in float32: bfloat16 would round away what 8 bits change.

        Args:
            changes: of a layer (its full name), as the candidates have them.

        Returns:
            For each layer its full name, and for each change float32 [passes, rows], of all calls.
        """
        module = _float32(self.module)
        bases = [_Base.of(module, self.layers, call) for call in self.calls if call.gradients]
        for layer in self.layers:
            name = self.full_name(layer)
            yield (
                name,
                [
                    torch.cat([base.product(module, layer, change) for base in bases], 1)
                    for change in changes(name)
                    if bases
                ],
            )


@dataclass(eq=False)
class _Base:
    """A call that is run again, in float32, unchanged.

    Args:
        last: layers whose output is the module's own, with their input.
    """

    call: _Call
    output: Tensor
    last: dict[str, tuple[Any, ...]]

    @classmethod
    def of(cls, module: nn.Module, layers: Iterable[str], call: _Call) -> "_Base":
        call = _Call(
            mapped(call.arguments, _as_float32), mapped(call.keywords, _as_float32), call.gradients
        )
        seen: dict[str, tuple[tuple[Any, ...], Tensor]] = {}

        def watching(layer: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
            return lambda _, arguments, output: seen.update({layer: (arguments, output)})

        inside = {layer: module.get_submodule(layer) for layer in layers if layer}
        handles = [m.register_forward_hook(watching(layer)) for layer, m in inside.items()]
        try:
            output = first_tensor(module(*call.arguments, **call.keywords))
        finally:
            for handle in handles:
                handle.remove()
        return cls(call, output, {n: given for n, (given, made) in seen.items() if made is output})

    def product(self, module: nn.Module, layer: str, change: Change) -> Tensor:
        """float32 [passes, rows]."""
        if layer in self.last:
            part, arguments, keywords = module.get_submodule(layer), self.last[layer], {}
        else:
            part, arguments, keywords = module, self.call.arguments, self.call.keywords
        with changed(module, {layer: change}):
            moved = first_tensor(part(*arguments, **keywords)) - self.output
        rows = moved.reshape(-1, moved.shape[-1])
        made = [(g.reshape(rows.shape).float() * rows).sum(1) for g in self.call.gradients]
        return torch.stack(made)


def places_of(model: nn.Module, layers: Iterable[str]) -> list[Place]:
    """Where to look at each layer: its parent, if that is a module of a block that is called, else
    the layer itself."""
    blocks = tuple(f"{name}." for names in block_lists(model) for name in names)
    found: dict[str, Place] = {}
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        whole = f"{parent}.".startswith(blocks) and _is_called(model.get_submodule(parent))
        place, inside = (parent, leaf) if whole else (name, "")
        found.setdefault(place, Place(place, model.get_submodule(place), [])).layers.append(inside)
    return list(found.values())


def _is_called(module: nn.Module) -> bool:
    """It is no mere list of modules."""
    return type(module).forward is not nn.ModuleList.forward


@contextmanager
def recorded(places: Iterable[Place]) -> Iterator[None]:
    """Within it, calls of the modules are kept, and each backward pass leaves its gradients."""
    handles = []
    for place in places:
        place.calls.clear()
        handles.append(place.module.register_forward_hook(_recording(place), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recording(place: Place) -> Callable[..., None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], made: Any) -> None:
        call = _Call(mapped(arguments, Tensor.detach), mapped(keywords, Tensor.detach))
        place.calls.append(call)

        def keep(gradient: Tensor) -> None:
            if not bool(gradient.isfinite().all()):
                raise ModelError(f"{place.name}: the gradient of its output is not finite")
            call.gradients.append(gradient)

        output = first_tensor(made)
        if output.requires_grad:
            output.register_hook(keep)  # type: ignore[no-untyped-call]

    return hook


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of several.

    Raises:
        UnsupportedError: it is no tensor.
    """
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise UnsupportedError(
            "sensitivities need modules that return a tensor, or several of which the first is "
            f"what they compute; one returned a {type(found).__name__}"
        )
    return found


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _float32(module: nn.Module) -> nn.Module:
    """The module, or a copy in float32 if some of it is of another dtype."""
    if all(p.dtype == torch.float32 for p in module.parameters()):
        return module
    return copy.deepcopy(module).float()
