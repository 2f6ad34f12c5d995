"""The blocks of a model as regions of a compiled graph: one is traced and compiled for all."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from ptq.likeness import Leaf, differences, leaves
from ptq.model import eval_mode

Forward = Callable[..., Any]
_REUSES = "reuse_hash_fn" in inspect.signature(torch.compiler.nested_compile_region).parameters
"""torch traces a region once for several calls (from 2.13 on)."""


@dataclass(frozen=True)
class _Call:
    """What a block was given in a step, and what it returned."""

    hidden: Tensor
    options: dict[str, Any]
    output: Tensor


@torch.no_grad()
def find_regions(model: Any, options: dict[str, Any]) -> dict[nn.Module, Forward]:
    """The blocks that do the same with weights of their own, each with its forward pass as a
    region.

    Two blocks do the same if all that they consist of is equal, but for the values of their tensors
    and their position in the model, and if the position makes no difference: with the position of
    the group's first block in it, a block must return what it returned, bit for bit.

    Args:
        options: of a step of the model, with a cache that has begun. Nothing of it is changed.

    Returns:
        Nothing if the cache is no ``StaticCache``, or torch does not reuse regions.
    """
    cache = options.get("past_key_values")
    if not _REUSES or type(cache) is not StaticCache:
        return {}
    calls = _record(model, options, cache)
    count = len(cache.layers)
    firsts: list[tuple[nn.Module, int, list[Leaf]]] = []
    found: dict[nn.Module, Forward] = {}
    for block, position in _positions(model):
        if block not in calls or type(cache.layers[position]) is not StaticLayer:
            continue
        own = leaves(block)
        for group, (first, of_first, theirs) in enumerate(firsts):
            places = differences(theirs, own, (of_first, position))
            if places is not None and _unused(
                places, (of_first, position), block, calls[block], cache
            ):
                found.setdefault(first, _forward(first, group, of_first, count))
                found[block] = _forward(block, group, position, count)
                break
        else:
            firsts.append((block, position, own))
    return found


@contextmanager
def as_regions(regions: dict[nn.Module, Forward]) -> Iterator[None]:
    """While it lasts, the compiler sees the blocks as regions."""
    for block, forward in regions.items():
        block.__dict__["forward"] = forward
    try:
        yield
    finally:
        for block in regions:
            del block.__dict__["forward"]


def _forward(block: nn.Module, group: int, position: int, count: int) -> Forward:
    """Of a block: its group's number, its position, and how many layers the cache has."""

    def forward(hidden: Tensor, *, past_key_values: Any = None, **options: Any) -> Any:
        layer = past_key_values.layers[position]
        states = (layer.keys, layer.values, layer.cumulative_length)
        return _region(group, count, block, hidden, *states, options)

    return forward


def _run(
    _group: int,
    count: int,
    block: nn.Module,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    options: dict[str, Any],
) -> Any:
    """The block's own forward pass, with a cache whose every layer is the given one."""
    layer = StaticLayer(keys.shape[2])
    layer.keys, layer.values, layer.cumulative_length = keys, values, length
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True
    cache = Cache(layers=[layer] * count)
    return type(block).forward(block, hidden, past_key_values=cache, **options)


_region = (
    torch.compiler.nested_compile_region(_run, reuse_hash_fn=lambda group, *_: group)
    if _REUSES
    else _run
)


def _record(model: Any, options: dict[str, Any], cache: StaticCache) -> dict[nn.Module, _Call]:
    """The calls of blocks in a step, of those that take a hidden state and return another."""
    calls: dict[nn.Module, _Call] = {}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        plain = len(args) == 1 and isinstance(output, Tensor) and "forward" not in vars(block)
        if plain and isinstance(kwargs.get("past_key_values"), StaticCache):
            rest = {name: v for name, v in kwargs.items() if name != "past_key_values"}
            calls[block] = _Call(args[0], rest, output)

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block, _ in _positions(model)]
    try:
        with eval_mode(model):
            model(**{**options, "past_key_values": copy.deepcopy(cache)})
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _positions(model: nn.Module) -> list[tuple[nn.Module, int]]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return [(block, index) for each in lists for index, block in enumerate(each)]


def _unused(
    places: list[tuple[Any, str]],
    positions: tuple[int, int],
    block: nn.Module,
    call: _Call,
    cache: Any,
) -> bool:
    """Whether a block returns the same, bit for bit, with the first one's position in these places
    instead of its own."""
    of_first, position = positions
    layer = copy.deepcopy(cache.layers[position])
    states = (layer.keys, layer.values, layer.cumulative_length)
    for owner, name in places:
        vars(owner)[name] = of_first
    try:
        found = _run(0, len(cache.layers), block, call.hidden, *states, call.options)
    finally:
        for owner, name in places:
            vars(owner)[name] = position
    return torch.equal(found, call.output)
