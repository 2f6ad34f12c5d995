"""Letting ``model.generate`` use a quantized cache by itself."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)

from ptq.calibrate import Progress
from ptq.config import KVCacheConfig, Plugin, cache_config
from ptq.errors import CalibrationError, UnsupportedError
from ptq.kv_cache.cache import QuantizedCache, check_heads
from ptq.kv_cache.calibrate import calibrate_cache, check_static
from ptq.kv_cache.scales import check_scales, drop_scales, held_scales, hold_scales


class GenerateQuantized:
    """A model's ``generate`` that begins with a quantized cache, where no other is asked for.

    ``past_key_values=``, ``cache_implementation=`` and ``use_cache=False`` do what they always do.
    """

    def __init__(self, model: Any, settings: KVCacheConfig) -> None:
        self.model = model
        self.kv_cache = settings

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        generate = type(self.model).generate
        config = arguments[1] if len(arguments) > 1 else options.get("generation_config")
        if options.get("past_key_values") is not None or _asks_for_another(config, options):
            return generate(self.model, *arguments, **options)
        cache = new_cache(self.model)
        if getattr(config, "is_assistant", False):  # its tokens may be taken back
            cache.activate_past_recording()  # type: ignore[no-untyped-call]
        return generate(self.model, *arguments, **{**options, "past_key_values": cache})


def _asks_for_another(config: Any, options: Mapping[str, Any]) -> str | None:
    """What a generation config, or keyword arguments, say of the cache; None if nothing."""
    for name, usual in (("use_cache", (True,)), ("cache_implementation", ("hybrid",))):
        # Old generation configs say hybrid, which transformers takes for the default.
        value = options.get(name)
        value = getattr(config, name, None) if value is None else value
        if value is not None and value not in usual:
            return f"{name}={value!r}"
    return None


def quantize_cache(
    model: nn.Module,
    cache: "str | dict[str, Any] | KVCacheConfig | None",
    *,
    calibration: Iterable[Any] | None = None,
    observer: str | Plugin = "minmax",
    progress: Progress = iter,
) -> Any:
    """Have ``model.generate`` keep keys and values as integers, without further arguments.

    A checkpoint that is saved afterwards (:func:`ptq.save`, ``save_pretrained`` of a quantized
    model) remembers it. Calls of the model itself, without ``generate``, take
    ``past_key_values=ptq.QuantizedCache(model.config, ...)``. Cross-attention of an encoder-decoder
    stays float.

    Args:
        cache: ``"int8"``, ``"int4"``, or a mapping of :class:`ptq.config.KVCacheConfig`; None for
            the float cache again.
        calibration: batches for static scales, as of :func:`ptq.quantize`: of the model as it is
            now, so quantize its weights before. The scales become part of the model
            (``kv_cache_scales``) and of its checkpoint.
        observer: which range of those batches is quantized, ``"minmax"`` or another one of
            ``calibration.observer``.

    Returns:
        The model.

    Raises:
        ConfigError: a setting is unknown or out of range.
        CalibrationError: static scales without data, or with data that cannot be used.
        UnsupportedError: the model has no key-value cache, its heads do not fit the groups, or its
            decoding is compiled, which needs a cache of fixed size.
    """
    if cache is None:
        if cache_settings(model) is not None:
            _refuse_compiled(model)
            del model.generate
            drop_scales(model)
        return model
    settings = cache_config(cache)
    plugin = Plugin(name=observer) if isinstance(observer, str) else observer
    check_cache(model, settings, plugin)
    if not settings.static:
        drop_scales(model)
    elif calibration is None:
        raise CalibrationError(
            "kv_cache has static scales, which need calibration data: pass calibration=batches, or "
            "choose mode: dynamic"
        )
    else:
        hold_scales(model, calibrate_cache(model, settings, calibration, plugin, progress))
    attach_cache(model, settings)
    return model


def attach_cache(model: nn.Module, settings: KVCacheConfig) -> None:
    """As :func:`quantize_cache`, of what was checked when it was saved; a model of another class
    that does not generate (the decoder without its head) is left alone.

    Raises:
        CheckpointError: static scales that it has are no positive numbers.
    """
    check_scales(model)
    if isinstance(model, PreTrainedModel) and model.can_generate():
        model.generate = GenerateQuantized(model, settings)  # type: ignore[assignment]


def check_cache(model: nn.Module, settings: KVCacheConfig, observer: Plugin) -> None:
    """Whether the model can have such a cache.

    Args:
        observer: for static scales.

    Raises:
        ConfigError: the observer is unknown, or has no ranges of the kind that is asked.
        UnsupportedError: it cannot; the message says why.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UnsupportedError(
            f"{type(model).__name__} does not generate, so it keeps no keys and values; remove "
            "kv_cache"
        )
    own: Any = type(model)
    if own.generate is not GenerationMixin.generate or not own._supports_default_dynamic_cache():
        raise UnsupportedError(
            f"{own.__name__} generates in its own way in transformers, or has a cache of its own "
            "kind; remove kv_cache"
        )
    other = _asks_for_another(model.generation_config, {})
    if other is not None:
        raise UnsupportedError(
            f"model.generation_config says {other}, which leaves no place for a quantized cache; "
            "set that to None, or remove kv_cache"
        )
    _refuse_compiled(model)
    check_heads(model.config, settings)
    if settings.static:
        check_static(model, settings, observer)


def _refuse_compiled(model: nn.Module) -> None:
    if not isinstance(model.__dict__.get("generate"), GenerateQuantized | None):
        raise UnsupportedError(
            "model.generate is replaced already (by ptq.compile?), and compiled code has the cache "
            "that it was compiled for: choose the cache of a model that is not compiled, and then "
            "compile it"
        )


def cache_settings(model: nn.Module) -> KVCacheConfig | None:
    """What :func:`quantize_cache` was told, or None."""
    # That of a compiled model (ptq.compilation.CompiledGenerate) has it as well.
    found = getattr(model.__dict__.get("generate"), "kv_cache", None)
    return found if isinstance(found, KVCacheConfig) else None


def new_cache(model: Any) -> Cache:
    """An empty cache for a model whose cache is quantized."""
    settings = cache_settings(model)
    assert settings is not None
    cache = QuantizedCache(model.config, scales=held_scales(model), **settings.model_dump())
    if not model.config.is_encoder_decoder:
        return cache
    return EncoderDecoderCache(
        cache, DynamicCache(config=model.config.get_text_config(decoder=True))
    )
