"""The quantized key-value cache of a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    get_layer_types_and_kwargs,
)

from ptq.config import KVCacheConfig, make_section
from ptq.errors import ConfigError, UnsupportedError
from ptq.kv_cache.layer import QuantizedLayer, state_formats
from ptq.kv_cache.scales import QUANTIZED, LayerScales, quantized_layers

_BFLOAT16 = 2  # bytes


@dataclass(frozen=True)
class CacheSize:
    """What a cache holds.

    Args:
        tokens: that it has seen, of each sequence.
        nbytes: of all its tensors: codes, scales, zero points, and what is float; not the model's
            static scales.
        bfloat16_nbytes: of the same tokens' keys and values in bfloat16.
    """

    tokens: int
    nbytes: int
    bfloat16_nbytes: int

    @property
    def fraction(self) -> float:
        return self.nbytes / self.bfloat16_nbytes

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "fraction": self.fraction,
            "bytes_per_token": self.nbytes / self.tokens,
            "bfloat16_bytes_per_token": self.bfloat16_nbytes / self.tokens,
        }

    def __str__(self) -> str:
        return (
            f"{self.nbytes / self.tokens:,.0f} bytes a token at {self.tokens:,} tokens, "
            f"{self.fraction:.3f} of bfloat16's {self.bfloat16_nbytes / self.tokens:,.0f}"
        )


class QuantizedCache(Cache):
    """Keys and values in int8 or int4; an argument of transformers models, ``past_key_values``.

    Greedy decoding, sampling, padding on the left, beams and assisted decoding work as with
    ``DynamicCache``. Layers of full, sliding-window and chunked attention are quantized; others
    (linear attention, convolutions) keep the state that transformers gives them. The cache grows,
    so it is not for compiled decoding.

    Source: Liu et al. 2024, KIVI, section 3 (keys per channel, values per token, newest tokens in
    float). The keys are those that transformers stores, with positions applied.

    Args:
        config: of the model.
        bits: 8 or 4.
        settings: further ones, as of :class:`ptq.config.KVCacheConfig`: ``keys``, ``values``,
            ``key_group_size``, ``value_group_size``, ``symmetric``, ``window``, ``scale_dtype``,
            ``mode``.
        scales: of each layer, where ``mode`` is static: ``ptq.kv_cache.held_scales(model)``, or
            from :func:`ptq.kv_cache.calibrate_cache`.

    Raises:
        ConfigError: a setting is unknown or out of range, or static scales are missing or of
            another number of layers.
        UnsupportedError: the model has no key-value cache, or a group size does not fit its heads.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        bits: int = 8,
        *,
        scales: Mapping[int, LayerScales] | None = None,
        **settings: Any,
    ) -> None:
        self.settings = make_section(KVCacheConfig, "QuantizedCache", bits=bits, **settings)
        check_heads(config, self.settings)
        scales = _checked(scales, config, self.settings)
        types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        super().__init__(
            layers=[
                _layer(kind, kwargs, self.settings, scales.get(index))
                for index, (kind, kwargs) in enumerate(zip(types, options, strict=True))
            ]
        )

    @property
    def quantized(self) -> list[QuantizedLayer]:
        """The layers that keep codes."""
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    def size(self) -> CacheSize:
        """Bytes that are held now, counted tensor by tensor.

        Layers that have no keys and values are not counted.
        """
        started = [layer for layer in self.quantized if layer.is_initialized]
        return CacheSize(
            max((layer.seen for layer in started), default=0),
            sum(layer.nbytes for layer in started),
            sum(_BFLOAT16 * layer.numel for layer in started),
        )


def check_heads(config: PretrainedConfig, settings: KVCacheConfig) -> None:
    """Whether the states of a model can be stored, as far as its config says.

    Raises:
        UnsupportedError: no layer has a key-value cache, or a group size does not fit the heads.
    """
    text = config.get_text_config(decoder=True)
    types, _ = get_layer_types_and_kwargs(text)
    if not quantized_layers(config):
        found = ", ".join(sorted(set(types))) or "none"
        raise UnsupportedError(
            f"no layer of a {config.model_type} model has a key-value cache that ptq can quantize "
            f"(layers: {found}); remove kv_cache"
        )
    width = getattr(text, "head_dim", None)
    if isinstance(width, int):
        for fmt, name in zip(state_formats(settings), ("key", "value"), strict=True):
            fmt.check(name, width)


def _checked(
    scales: Mapping[int, LayerScales] | None, config: PretrainedConfig, settings: KVCacheConfig
) -> Mapping[int, LayerScales]:
    """Static scales of every layer; none for a dynamic cache."""
    if not settings.static:
        return {}
    if scales is None:
        raise ConfigError(
            "QuantizedCache: mode: static needs calibrated scales: call ptq.quantize_cache(model, "
            "{'mode': 'static'}, calibration=batches), and let model.generate make the cache"
        )
    wanted = quantized_layers(config)
    if sorted(scales) != wanted:
        raise ConfigError(
            f"the static scales of the key-value cache are of {len(scales)} layers, and "
            f"{len(wanted)} layers of this {config.model_type} model have such a cache; calibrate "
            "them with this model"
        )
    return scales


def _layer(
    kind: str, options: dict[str, Any], settings: KVCacheConfig, scales: LayerScales | None
) -> Any:
    if kind not in QUANTIZED:
        return DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)
    return QuantizedLayer(settings, options.get("sliding_window"), scales)
