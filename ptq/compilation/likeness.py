"""Whether two objects are alike but for the values of their tensors."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Enum,
)  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """Something that is compared as a whole.

    Args:
        owner, name: the object and its attribute that it was found in.
        value: itself, or what counts of it: shape, strides, dtype and device of a tensor; the type
            of what has parts; the identity of what cannot be looked into.
    """

    owner: Any
    name: str
    value: Any


def leaves(value: Any) -> list[Leaf]:
    """All that an object consists of, in an order that is the same for objects alike."""
    found: list[Leaf] = []
    _collect(Leaf(None, "", value), {}, found)
    return found


def differences(
    first: list[Leaf], second: list[Leaf], positions: tuple[int, int]
) -> list[tuple[Any, str]] | None:
    """Attributes (owner, name) of the second object that hold its position where those of the first
    one hold the first one's; None if the two are not alike."""
    if len(first) != len(second):
        return None
    places = []
    for a, b in zip(first, second, strict=True):
        if type(a.value) is type(b.value) and a.value == b.value:
            continue
        numbers = type(a.value) is type(b.value) is int and hasattr(b.owner, "__dict__")
        if not numbers or (a.value, b.value) != positions:
            return None
        places.append((b.owner, b.name))
    return places


def _collect(leaf: Leaf, seen: dict[int, int], found: list[Leaf]) -> None:
    value = leaf.value

    def note(what: Any) -> None:
        found.append(Leaf(leaf.owner, leaf.name, what))

    if isinstance(value, _PLAIN):
        note(value)
    elif isinstance(value, Tensor):
        note((value.shape, value.stride(), value.dtype, value.device, value.requires_grad))
    elif id(value) in seen:
        note(("seen", seen[id(value)]))
    elif callable(value) and not isinstance(value, nn.Module):
        note(id(value))
    else:
        seen[id(value)] = len(seen)
        note(type(value))
        parts = _parts(value)
        if parts is None:
            note(id(value))
        for part in parts or ():
            _collect(part, seen, found)


def _parts(value: Any) -> list[Leaf] | None:
    """What an object is made of; None if that cannot be seen."""
    if isinstance(value, dict):
        return [Leaf(value, str(k), item) for pair in value.items() for k, item in _named(pair)]
    if isinstance(value, set | frozenset):
        return [Leaf(value, "", item) for item in sorted(value, key=repr)]
    if isinstance(value, list | tuple | slice):
        items = (value.start, value.stop, value.step) if isinstance(value, slice) else value
        return [Leaf(value, str(index), item) for index, item in enumerate(items)]
    if hasattr(value, "__dict__"):
        return [Leaf(value, name, item) for name, item in vars(value).items()]
    return None


def _named(pair: tuple[Any, Any]) -> list[tuple[str, Any]]:
    """A key and its item, both to be compared."""
    return [(f"key {pair[0]}", pair[0]), (str(pair[0]), pair[1])]
