"""torch.compile for whole models: decoding in one graph, over a cache of fixed size."""

import functools
import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel

from ptq.errors import ConfigError, UnsupportedError
from ptq.model import eval_mode, max_positions
from ptq.modules import QuantLinear

_DEFAULT_LENGTH = 1024
_WARM_TOKENS = 3  # the first comes from the prompt, the second compiles, the third must not


def compile_model(
    model: nn.Module, *, max_length: int | None = None, batch_size: int = 1
) -> nn.Module:
    """Make a model faster with ``torch.compile``, in place.

    A model that generates: ``model.generate`` decodes through one compiled graph, with a key-value
    cache of fixed size; prompts run as before, because a graph for every length would cost more
    than it saves. The graph is compiled now, which takes about a minute for 30 blocks and some
    seconds when the compiler's cache on the disk has it. Other numbers of sequences than
    ``batch_size``, and more tokens than ``max_length``, compile again when they first come.

    Any other model: its ``forward`` is compiled at the first call, for any number of tokens.

    Neither changes what is saved.

    Args:
        max_length: tokens of prompt and continuation together that the cache holds (default:
            1024, or the model's limit if that is lower).
        batch_size: sequences that are generated together.

    Returns:
        The model.

    Raises:
        UnsupportedError: there is no C++ compiler for a model on the CPU, or the model has no
            key-value cache of fixed size.
        ConfigError: ``max_length`` or ``batch_size`` is out of range.
    """
    _require_compiler(model)
    if isinstance(model, PreTrainedModel) and model.can_generate():
        _compile_generation(model, max_length, batch_size)
    else:
        model.compile(dynamic=True)
    return model


def _compile_generation(model: Any, max_length: int | None, batch_size: int) -> None:
    limit = max_positions(model.config) or max_length or _DEFAULT_LENGTH
    max_length = min(limit, _DEFAULT_LENGTH) if max_length is None else max_length
    if not _WARM_TOKENS < max_length <= limit:
        raise ConfigError(f"max_length {max_length}: choose {_WARM_TOKENS + 1} to {limit}")
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}: at least 1")
    if not model._can_compile_fullgraph:
        raise UnsupportedError(
            f"{type(model).__name__} does not support a cache of fixed size in transformers; "
            "call torch.compile yourself"
        )
    _bind(model, batch_size)
    settings = CompileConfig(mode="default")
    # Else transformers compiles on accelerators only.
    settings._compile_all_devices = True  # type: ignore[assignment]
    generate = type(model).generate.__get__(model)
    model.generate = functools.partial(
        generate, cache_implementation="static", compile_config=settings
    )
    _warm_up(model, max_length, batch_size)


def _require_compiler(model: nn.Module) -> None:
    device = next((t.device.type for t in model.parameters()), "cpu")
    names = (os.environ.get("CXX"), "g++", "clang++")
    if device == "cpu" and not any(name and shutil.which(name) for name in names):
        raise UnsupportedError(
            "ptq.compile needs a C++ compiler on a CPU: install g++ or clang++, or set CXX"
        )


@torch.no_grad()
def _bind(model: Any, rows: int) -> None:
    """Let the kernels make their forms of the weights, which must not happen in the graph."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            shape = (rows, layer.in_features)
            layer(torch.zeros(shape, dtype=model.dtype, device=layer.codes.device))


def _warm_up(model: Any, max_length: int, batch_size: int) -> None:
    """Generate a few tokens of a sequence that could become ``max_length`` long."""
    ids = torch.zeros((batch_size, 1), dtype=torch.int64, device=model.device)
    with eval_mode(model):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_length=max_length,
            min_new_tokens=_WARM_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            stopping_criteria=[_stop],
        )


def _stop(ids: Tensor, *_: object, **__: object) -> Tensor:
    return torch.full(ids.shape[:1], ids.shape[1] > _WARM_TOKENS, device=ids.device)
