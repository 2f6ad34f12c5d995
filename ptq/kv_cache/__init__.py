"""Keys and values of attention as integers, while a model generates."""

from ptq.kv_cache.cache import CacheSize, QuantizedCache
from ptq.kv_cache.generate import (
    attach_cache,
    cache_settings,
    check_cache,
    new_cache,
    quantize_cache,
)

__all__ = [
    "CacheSize",
    "QuantizedCache",
    "attach_cache",
    "cache_settings",
    "check_cache",
    "new_cache",
    "quantize_cache",
]
