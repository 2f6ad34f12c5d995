"""Static scales of a cache, from the keys and values of calibration batches."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ptq.calibrate import Progress, batches_of, call
from ptq.calibrate.inputs import all_finite, padding_mask, unmasked_rows
from ptq.config import KVCacheConfig, Plugin
from ptq.errors import CalibrationError, UnsupportedError
from ptq.kv_cache.layer import state_formats
from ptq.kv_cache.scales import LayerScales, quantized_layers, scale_shape
from ptq.model import eval_mode
from ptq.observers import Observer, make_observer

See = Callable[[Tensor, Tensor], None]


@dataclass
class _Watched:
    """The keys or the values of one layer.

    Args:
        name: for errors.
        axis: what shares a scale.
        observer: made when the shape is known.
    """

    name: str
    axis: str
    plugin: Plugin
    settings: KVCacheConfig
    observer: Observer | None = None
    shape: tuple[int, int] = (0, 0)

    def see(self, states: Tensor, mask: Tensor | None, batch: int) -> None:
        """Take in states [B, H, T, D], but for the tokens that are masked."""
        heads, width = states.shape[1], states.shape[3]
        rows = unmasked_rows(states.transpose(1, 2).flatten(2), mask)
        if not all_finite(rows):
            raise CalibrationError(
                f"{self.name} have NaN or Inf in calibration batch {batch} (counted from 0); run "
                "the model on it to find out why, or choose kv_cache mode: dynamic"
            )
        if self.axis == "head":
            rows = rows.view(-1, heads, width).transpose(1, 2).reshape(-1, heads)
        if self.observer is None:
            self.shape = scale_shape(self.axis, heads, width)
            self.observer = _observer(self.plugin, self.settings, self.axis, rows.shape[1])
        self.observer.update(rows)

    def range(self) -> tuple[Tensor, Tensor]:
        """Low and high, of the shape of the scales."""
        if self.observer is None:
            raise CalibrationError(
                f"calibration gave no tokens to {self.name}, so they cannot have static scales; "
                "give more data, or choose kv_cache mode: dynamic"
            )
        low, high = self.observer.range()
        return low.reshape(self.shape), high.reshape(self.shape)


def _observer(plugin: Plugin, settings: KVCacheConfig, axis: str, columns: int) -> Observer:
    return make_observer(plugin, settings, None if axis == "tensor" else columns)


def check_static(model: Any, settings: KVCacheConfig, observer: Plugin) -> None:
    """Whether static scales can be calibrated for this model, as far as its config says.

    Raises:
        ConfigError: there is no such observer, or it has no ranges per channel or head.
        UnsupportedError: the model is an encoder-decoder.
    """
    for axis in (settings.keys, settings.values):
        _observer(observer, settings, axis, 1)
    if model.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder, whose decoder sees nothing of a "
            "calibration text; choose kv_cache mode: dynamic"
        )


@torch.no_grad()
def calibrate_cache(
    model: nn.Module,
    settings: KVCacheConfig,
    data: Iterable[Any],
    observer: Plugin,
    progress: Progress = iter,
) -> dict[int, LayerScales]:
    """Static scales for a model's keys and values, as it makes them of calibration batches.

    Args:
        settings: of a static cache.
        data: batches, as of :func:`ptq.quantize`; masked tokens do not count.
        observer: which range of what was seen is quantized.

    Returns:
        The scales of each layer that has a quantized cache, by its position.

    Raises:
        CalibrationError: no batch, NaN or Inf, or a layer that no token reaches.
        ConfigError, UnsupportedError: as :func:`check_static`.
    """
    check_static(model, settings, observer)
    watched = {
        index: (
            _Watched(f"the keys of layer {index}", settings.keys, observer, settings),
            _Watched(f"the values of layer {index}", settings.values, observer, settings),
        )
        for index in quantized_layers(model.config)  # type: ignore[arg-type]
    }
    with eval_mode(model):
        for number, batch in enumerate(progress(batches_of(data))):
            _watch(model, batch, number, watched)
    formats = state_formats(settings)
    return {
        index: LayerScales(*(f.qparams(*w.range()) for f, w in zip(formats, pair, strict=True)))
        for index, pair in watched.items()
    }


def _watch(
    model: Any, batch: Any, number: int, watched: dict[int, tuple[_Watched, _Watched]]
) -> None:
    """Run one batch with a float cache whose layers show what they are given."""
    mask = padding_mask(batch)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for index, (keys, values) in watched.items():

        def see(k: Tensor, v: Tensor, keys: _Watched = keys, values: _Watched = values) -> None:
            keys.see(k, mask, number)
            values.see(v, mask, number)

        _show(cache.layers[index], see)
    call(model, batch, number, past_key_values=cache, use_cache=True, **_few_logits(model, batch))


def _few_logits(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Nobody reads the logits, which are the largest tensors of the pass: one is enough."""
    taken = "logits_to_keep" in inspect.signature(model.forward).parameters
    scored = isinstance(batch, Mapping) and "labels" in batch
    return {"logits_to_keep": 1} if taken and not scored else {}


def _show(layer: Any, see: See) -> None:
    update = layer.update

    def shown(keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> Any:
        see(keys, values)
        return update(keys, values, *arguments, **options)

    layer.update = shown
