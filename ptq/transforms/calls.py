"""The arguments of a call of a block: containers of tensors, copied, searched, cut short."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_PLAIN = (Tensor, bool, int, float, str, type(None))


def first_sequence(
    arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first sequence of a batch, wherever the batch is plainly the first dimension of every
    tensor; otherwise everything."""
    everything = (arguments, keywords)
    tensors = list(tensors_in(everything))
    hidden = next((x for x in tensors if x.is_floating_point() and x.dim() == 3), None)
    if hidden is None or hidden.shape[0] in (1, hidden.shape[1]) or not _is_plain(everything):
        return everything
    size = hidden.shape[0]
    if any(x.dim() > 1 and x.shape[0] not in (1, size) for x in tensors):
        return everything

    def first(x: Tensor) -> Tensor:
        return x[:1] if x.dim() > 0 and x.shape[0] == size else x

    sliced: tuple[tuple[Any, ...], dict[str, Any]] = mapped(everything, first)
    return sliced


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same plain containers, new, with every tensor changed."""
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: mapped(item, change) for key, item in value.items()}
    return change(value) if isinstance(value, Tensor) else value
