"""The blocks of a model as regions of a compiled graph: one is traced and compiled for all."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from ptq.compilation.likeness import differences, leaves
from ptq.compilation.situation import TENSORS_ALONE, taken_apart
from ptq.kv_cache import FixedLayer
from ptq.model import eval_mode


@dataclass(frozen=True)
class Region:
    """A block of which there are more.

    Args:
        group: the same for blocks that do the same.
        position: of the block, and of its layer of the cache.
        count: layers that the cache has.
    """

    group: int
    position: int
    count: int


@dataclass(frozen=True)
class _Call:
    """What a block was given in a step, and what it returned."""

    hidden: Tensor
    options: dict[str, Any]
    output: Tensor


@torch.no_grad()
def find_regions(model: Any, options: dict[str, Any]) -> dict[nn.Module, Region]:
    """The blocks that do the same with weights of their own.

    Two blocks do the same if all that they consist of is equal, but for the values of their tensors
    and their position in the model, and if the position makes no difference: with the position of
    the group's first block in it, a block must return what it returned, bit for bit.

    Args:
        options: of a step of the model, with a cache that has begun. Nothing of it is changed.

    Returns:
        Nothing if the cache is no ``StaticCache``, or torch does not reuse regions (before 2.13).
    """
    cache = options.get("past_key_values")
    reuses = "reuse_hash_fn" in inspect.signature(torch.compiler.nested_compile_region).parameters
    if not reuses or type(cache) is not StaticCache:
        return {}
    calls = _record(model, options, cache)
    firsts: list[tuple[nn.Module, int]] = []
    found: dict[nn.Module, Region] = {}
    for block, position in _positions(model):
        if block not in calls or type(cache.layers[position]) not in TENSORS_ALONE:
            continue
        for group, (first, of_first) in enumerate(firsts):
            if _alike(first, of_first, block, position, calls[block], cache):
                found[first] = Region(group, of_first, len(cache.layers))
                found[block] = Region(group, position, len(cache.layers))
                break
        else:
            firsts.append((block, position))
    return found


@contextmanager
def as_regions(regions: dict[nn.Module, Region]) -> Iterator[None]:
    """While it lasts, the compiler sees the blocks as regions."""
    for block, region in regions.items():
        block.__dict__["forward"] = _forward(block, region)
    try:
        yield
    finally:
        for block in regions:
            del block.__dict__["forward"]


def _forward(block: nn.Module, region: Region) -> Any:
    def forward(hidden: Tensor, *, past_key_values: Any = None, **options: Any) -> Any:
        layer = past_key_values.layers[region.position]
        return _region(region.group, region.count, block, hidden, *taken_apart(layer), options)

    return forward


def _run(
    _group: int,
    count: int,
    block: nn.Module,
    hidden: Tensor,
    spec: Any,
    parts: list[Tensor],
    options: dict[str, Any],
) -> Any:
    """The block's own forward pass, with a cache whose every layer is the one of these parts."""
    cache = Cache(layers=[_put_together(spec, parts)] * count)
    return type(block).forward(block, hidden, past_key_values=cache, **options)


def _put_together(spec: Any, parts: list[Tensor]) -> Any:
    if spec is not None:
        return FixedLayer.of(spec, parts)
    keys, values, length = parts
    layer = StaticLayer(keys.shape[2])
    layer.keys, layer.values, layer.cumulative_length = keys, values, length
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True
    return layer


_region = (
    torch.compiler.nested_compile_region(_run, reuse_hash_fn=lambda group, *_: group)
    if "reuse_hash_fn" in inspect.signature(torch.compiler.nested_compile_region).parameters
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


def _alike(
    first: nn.Module, of_first: int, block: nn.Module, position: int, call: _Call, cache: Any
) -> bool:
    """Whether a block is the first one with other tensors and another position, which is unused."""
    places = differences(leaves(first), leaves(block), (of_first, position))
    if places is None:
        return False
    parts = taken_apart(copy.deepcopy(cache.layers[position]))
    for owner, name in places:
        vars(owner)[name] = of_first
    try:
        found = _run(0, len(cache.layers), block, call.hidden, *parts, call.options)
    finally:
        for owner, name in places:
            vars(owner)[name] = position
    return torch.equal(found, call.output)
