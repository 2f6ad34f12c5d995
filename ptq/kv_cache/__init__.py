"""Keys and values of attention as integers, while a model generates."""

from ptq.kv_cache.cache import CacheSize, QuantizedCache
from ptq.kv_cache.calibrate import calibrate_cache
from ptq.kv_cache.fixed import FixedLayer, make_fixed
from ptq.kv_cache.generate import (
    GenerateQuantized,
    attach_cache,
    cache_settings,
    check_cache,
    new_cache,
    quantize_cache,
)
from ptq.kv_cache.scales import (
    LayerScales,
    expected_scales,
    held_scales,
    hold_empty_scales,
    hold_scales,
    is_scale,
)

__all__ = [
    "CacheSize",
    "FixedLayer",
    "GenerateQuantized",
    "LayerScales",
    "QuantizedCache",
    "attach_cache",
    "cache_settings",
    "calibrate_cache",
    "check_cache",
    "expected_scales",
    "held_scales",
    "hold_empty_scales",
    "hold_scales",
    "is_scale",
    "make_fixed",
    "new_cache",
    "quantize_cache",
]
