"""What a compiled step depends on besides the model: what it is given, and torch's global state."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from ptq.kv_cache import FixedLayer

TENSORS_ALONE = (StaticLayer, FixedLayer)
"""Layers of a cache that hold tensors of fixed size and nothing else that a step changes."""
_PLAIN = (bool, int, float, str, type(None))


def is_plain(cache: Any) -> bool:
    """Whether all that a cache holds is tensors of fixed size: of a step's work nothing is left in
    numbers of Python, which code without guards would have as constants."""
    return type(cache) is StaticCache and all(
        isinstance(layer, StaticLayer) and type(layer) in TENSORS_ALONE and layer.is_initialized
        for layer in cache.layers
    )


def is_known(options: dict[str, Any]) -> bool:
    """Whether all options are of kinds whose equality can be told, but for the cache."""
    return all(map(_known, options.values()))


def _known(value: Any) -> bool:
    if isinstance(value, dict):
        return is_known(value)
    if isinstance(value, list | tuple):
        return all(map(_known, value))
    return isinstance(value, (Tensor, StaticCache, *_PLAIN))


def taken_apart(layer: Any) -> tuple[Any, list[Tensor]]:
    """A layer of a plain cache as constants and tensors."""
    if isinstance(layer, FixedLayer):
        return layer.spec, layer.parts()
    return None, [layer.keys, layer.values, layer.cumulative_length]


def brief(options: dict[str, Any]) -> Hashable:
    """What differs between steps of one generation, if anything does: shapes and dtypes of tensors,
    plain values, which cache it is; of other values (see :func:`is_known`) the type alone."""
    return tuple((name, _fact(value)) for name, value in options.items())


def situation(options: dict[str, Any]) -> Hashable:
    """What one compiled code is for: the options, with the sizes of a plain cache's tensors in the
    place of the cache, and what torch looks at for its own guard on its global state."""
    cache: Any = options.get("past_key_values")
    others = {name: value for name, value in options.items() if value is not cache}
    if not is_plain(cache):
        return brief(others), _global_state()
    layers = (taken_apart(layer) for layer in cache.layers)
    states = tuple((spec, *map(_fact, parts)) for spec, parts in layers)
    return brief(others), states, _global_state()


def _fact(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        size = value.shape, value.stride()
        return type(value), size, value.dtype, value.device, value.requires_grad
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict):
        return brief(value)
    if isinstance(value, StaticCache):
        return id(value)
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_fact, value))
    return str(type(value))


def _global_state() -> Hashable:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.get_num_threads(),
    )
