"""Logits of a model that reads its own quantized cache, as when it generates."""

from typing import Any

import torch
from torch import Tensor, nn

from ptq.errors import ConfigError
from ptq.evaluation.logits import checked_logits
from ptq.kv_cache import CacheSize, QuantizedCache, cache_settings, held_scales
from ptq.model import eval_mode

_PIECE = 64  # tokens at a time, where it makes no difference
_SMALL_PIECE = 16


class CachedLogits:
    """As :func:`window_logits`, piece by piece, with a new cache for each window.

    A piece is as long as a quantized group, so that tokens see as many float ones as they do when
    the model decodes: the float window, and up to a group more. Without a float window the
    attention reads codes only, whatever the pieces.

    Raises:
        ConfigError: the model's cache is not quantized.
    """

    def __init__(self, model: nn.Module) -> None:
        settings = cache_settings(model)
        if settings is None:
            raise ConfigError(
                f"{type(model).__name__} has a float cache: call ptq.quantize_cache(model, 'int8') "
                "before evaluating through it"
            )
        self.settings = settings
        self.size: CacheSize | None = None
        """Of the longest window's cache, at its end."""

    @torch.no_grad()
    def __call__(self, model: nn.Module, window: Tensor) -> Tensor:
        """Logits [T - 1, V] that predict the tokens 1 .. T - 1 of a window [T] of token ids.

        Raises:
            UnsupportedError, ModelError: as :func:`window_logits`.
        """
        config: Any = model.config
        cache = QuantizedCache(config, scales=held_scales(model), **self.settings.model_dump())
        step = max((layer.step for layer in cache.quantized), default=1)
        length = max(step, _SMALL_PIECE) if self.settings.window else _PIECE
        ids = window.to(next(model.parameters()).device)
        made: Tensor | None = None
        with eval_mode(model):
            for start in range(0, len(ids), length):
                piece = ids[None, start : start + length]
                output = model(input_ids=piece, past_key_values=cache, use_cache=True)
                logits = checked_logits(model, output, window)[0]
                if made is None:  # whole from the start: pieces and their sum need twice the memory
                    made = logits.new_empty(len(ids), logits.shape[1])
                made[start : start + length] = logits
        assert made is not None
        size = cache.size()
        if self.size is None or size.tokens > self.size.tokens:
            self.size = size
        return made[:-1]
