"""torch.compile for whole models: decoding in one graph, over a cache of fixed size."""

import copy
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, StaticCache

from ptq.compilation.step import CompiledStep, bind
from ptq.config import KVCacheConfig
from ptq.errors import ConfigError, UnsupportedError
from ptq.kv_cache import GenerateQuantized, cache_settings, held_scales, make_fixed
from ptq.model import eval_mode, max_positions
from ptq.native import find_compiler

_DEFAULT_LENGTH = 1024
_OTHER_CACHES = ("past_key_values", "assistant_model", "prompt_lookup_num_tokens")
_WARM_TOKENS = 3  # the first comes from the prompt, the second compiles, the third must not


def compile_model(
    model: nn.Module, *, max_length: int | None = None, batch_size: int = 1
) -> nn.Module:
    """Make a model faster with ``torch.compile``, in place.

    A model that generates: ``model.generate`` decodes through one compiled graph, with a key-value
    cache of fixed size (quantized, if :func:`ptq.quantize_cache` was called before); prompts run as
    before, because a graph for every length would cost more than it saves. On a GPU the graph is a
    CUDA graph. It is compiled now, which takes some 15 s, and 5 s when the compiler's cache on the
    disk has it: blocks that do the same are compiled once. Other numbers of sequences than
    ``batch_size``, and more tokens than ``max_length``, compile again when they first come; other
    numbers of sequences every block by itself, which takes longer. What is changed of the model is
    noticed when the next generation begins.

    Any other model: its ``forward`` is compiled when it is first called, for any number of tokens:
    one graph for each range of rows that has a kernel of its own, and one for the first shape.

    Neither changes what is saved. Call :func:`ptq.tune` before, if at all: compiled code keeps the
    rule of thumb. A deep copy of the model compiles again.

    Args:
        max_length: tokens of prompt and continuation together that the cache holds (default:
            1024, or the model's limit if that is lower).
        batch_size: sequences that are generated together.

    Returns:
        The model.

    Raises:
        UnsupportedError: there is no C++ compiler for a model on the CPU, or the model is an
            encoder-decoder, or has no key-value cache of fixed size, or a quantized one with a
            sliding window, or a step of it is not one graph.
        ConfigError: ``max_length`` or ``batch_size`` is out of range.
    """
    _require_compiler(model)
    if isinstance(model, PreTrainedModel) and model.can_generate():
        _compile_generation(model, max_length, batch_size)
    else:
        bind(model, None)
        model.compile(dynamic=True)
    return model


class CompiledGenerate:
    """A model's ``generate`` that decodes compiled code over a cache of fixed size.

    With another cache, or a way of decoding that transformers offers without such a cache only
    (an assistant, prompt look-up), the model generates as before.

    Args:
        kv_cache: how keys and values are kept, None for float.
    """

    def __init__(self, model: Any, batch_size: int, kv_cache: KVCacheConfig | None = None) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.step = CompiledStep(model, batch_size)
        self._lock = RLock()  # generations of several threads take turns
        self.settings = CompileConfig()
        # Else transformers compiles on accelerators only.
        self.settings._compile_all_devices = True  # type: ignore[assignment]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with self._lock:
            self.step.begin()
            self.model.get_compiled_call = self._step
            self.model._prepare_static_cache = self._fixed_cache
            try:
                return self._generate(*arguments, **options)
            finally:
                del self.model.get_compiled_call, self.model._prepare_static_cache

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = RLock()

    def _step(self, settings: object) -> CompiledStep:
        return self.step

    def _fixed_cache(self, *arguments: Any, **options: Any) -> Any:
        """transformers' cache of fixed size, its layers quantized where that was asked for."""
        model = self.model
        cache = type(model)._prepare_static_cache(model, *arguments, **options)
        if self.kv_cache is not None:
            make_fixed(cache, model.config, self.kv_cache, held_scales(model))
        return cache

    def _generate(self, *arguments: Any, **options: Any) -> Any:
        generate = type(self.model).generate
        given = any(options.get(name) is not None for name in _OTHER_CACHES)
        if given or options.get("use_cache") is False:
            if self.kv_cache is not None:
                return GenerateQuantized(self.model, self.kv_cache)(*arguments, **options)
            return generate(self.model, *arguments, **options)
        fixed = {"cache_implementation": "static", "compile_config": self.settings}
        config = options.get("generation_config")
        if config is None:
            return generate(self.model, *arguments, **{**fixed, **options})
        config = copy.deepcopy(config)
        for name, value in fixed.items():
            setattr(config, name, value)
        return generate(self.model, *arguments, **{**options, "generation_config": config})


def _compile_generation(model: Any, max_length: int | None, batch_size: int) -> None:
    limit = max_positions(model.config) or max_length or _DEFAULT_LENGTH
    max_length = min(limit, _DEFAULT_LENGTH) if max_length is None else max_length
    if not isinstance(max_length, int) or not _WARM_TOKENS < max_length <= limit:
        raise ConfigError(f"max_length {max_length}: choose {_WARM_TOKENS + 1} to {limit}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}: at least 1")
    if model.config.is_encoder_decoder or not model._can_compile_fullgraph:
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder, or has no cache of fixed size in "
            "transformers; "
            "call torch.compile yourself"
        )
    settings = cache_settings(model)
    if settings is not None:
        _check_cache(model, settings)
    before = model.__dict__.get("generate")
    model.generate = CompiledGenerate(model, batch_size, settings)
    try:
        _warm_up(model, max_length, batch_size)
    except BaseException as error:
        del model.generate
        if settings is not None:
            model.generate = before
        if isinstance(error, Unsupported):
            raise UnsupportedError(
                f"a step of {type(model).__name__} cannot be compiled as one graph (does a "
                f"hook make a number of a tensor?): {error}"
            ) from error
        raise


def _check_cache(model: Any, settings: KVCacheConfig) -> None:
    """Whether there is such a quantized cache of fixed size."""
    make_fixed(StaticCache(model.config, 1), model.config, settings, held_scales(model))


def _require_compiler(model: nn.Module) -> None:
    device = next((t.device.type for t in model.parameters()), "cpu")
    if device == "cpu" and find_compiler() is None:
        raise UnsupportedError(
            "ptq.compile needs a C++ compiler on a CPU: install g++ or clang++, or set CXX"
        )


def _warm_up(model: Any, max_length: int, batch_size: int) -> None:
    """Generate a few tokens of a sequence that could become ``max_length`` long."""
    ids = torch.zeros((batch_size, 1), dtype=torch.int64, device=model.device)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_length=max_length,
        min_new_tokens=_WARM_TOKENS,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        pad_token_id=0,
    )
    # What the model's own configuration asks of a generation must not count here.
    own, model.generation_config = model.generation_config, settings
    try:
        with eval_mode(model):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                stopping_criteria=[_stop],
            )
    finally:
        model.generation_config = own


def _stop(ids: Tensor, *_: object, **__: object) -> Tensor:
    return torch.full(ids.shape[:1], ids.shape[1] > _WARM_TOKENS, device=ids.device)
