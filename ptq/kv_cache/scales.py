"""The scales of a static cache, which a model holds and its checkpoint stores."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from ptq.config import KVCacheConfig, torch_dtype
from ptq.errors import CheckpointError
from ptq.kv_cache.states import QParams
from ptq.modules.buffers import kept_scales

SCALES = "kv_cache_scales"
"""The name of a model's module that has them: of layer 3 the keys' are
``kv_cache_scales.3.key_scale``."""
QUANTIZED = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers whose keys and values can be quantized, as transformers calls them."""


class LayerScales(nn.Module):
    """Of the keys and values of one layer.

    Buffers ``key_scale`` and ``value_scale``: [H, D] per channel, [H, 1] per head, [1, 1] per
    tensor; ``key_zero_point`` and ``value_zero_point``: int8, likewise, or None. ``.to(dtype)``
    leaves them as they are.
    """

    def __init__(self, keys: QParams, values: QParams) -> None:
        super().__init__()
        for name, found in (("key", keys), ("value", values)):
            self.register_buffer(f"{name}_scale", found.scale)
            self.register_buffer(f"{name}_zero_point", found.zero_point)

    @property
    def pair(self) -> tuple[QParams, QParams]:
        """Of the keys, and of the values."""
        found = self._buffers
        keys, values = (
            QParams(found[f"{name}_scale"], found[f"{name}_zero_point"])  # type: ignore[arg-type]
            for name in ("key", "value")
        )
        return keys, values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LayerScales":
        with kept_scales(self, self._buffers):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def quantized_layers(config: PretrainedConfig) -> list[int]:
    """Positions of the layers whose keys and values are quantized."""
    types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    return [index for index, kind in enumerate(types) if kind in QUANTIZED]


def hold_scales(model: nn.Module, layers: Mapping[int, LayerScales]) -> None:
    """Make them part of the model, in the place of others."""
    held = nn.ModuleDict({str(index): each for index, each in layers.items()})
    model.add_module(SCALES, held.train(model.training))


def held_scales(model: nn.Module) -> dict[int, LayerScales] | None:
    """Those of a model, by layer; None if it has none."""
    held = model._modules.get(SCALES)
    if not isinstance(held, nn.ModuleDict):
        return None
    layers: dict[str, Any] = dict(held.items())
    return {int(name): layer for name, layer in layers.items()}


def drop_scales(model: nn.Module) -> None:
    """The model has none afterwards."""
    if held_scales(model) is not None:
        del model._modules[SCALES]


def is_scale(name: str) -> bool:
    """Whether a tensor of this name in ``state_dict()`` is one of them."""
    return name.startswith(f"{SCALES}.")


def hold_empty_scales(
    model: nn.Module,
    config: PretrainedConfig,
    settings: KVCacheConfig,
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    where: object,
) -> list[str]:
    """Let a model have scales on the meta device, to be loaded into.

    Args:
        stored: dtype and shape of each tensor of the checkpoint, by its name.
        where: the checkpoint, for errors.

    Returns:
        The names of the tensors.

    Raises:
        CheckpointError: one is missing, is not what such a cache has, or is of a layer that the
            model does not have.
    """
    layers = {
        index: LayerScales(*_empty(index, settings, stored, where))
        for index in quantized_layers(config)
    }
    hold_scales(model, layers)
    names = [name for name in model.state_dict() if is_scale(name)]
    more = sorted(name for name in stored if is_scale(name) and name not in names)
    if more:
        raise CheckpointError(
            f"{where}: the {len(layers)} layers of the model that have a quantized cache have no "
            f"place for tensor {more[0]}; config.json is of another model, copy it again"
        )
    return names


def _empty(
    index: int,
    settings: KVCacheConfig,
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    where: object,
) -> Iterable[QParams]:
    for name, axis in (("key", settings.keys), ("value", settings.values)):
        kinds = {"scale": torch_dtype(settings.scale_dtype)}
        if not settings.symmetric:
            kinds["zero_point"] = torch.int8
        made = {}
        for kind, dtype in kinds.items():
            key = f"{SCALES}.{index}.{name}_{kind}"
            if key not in stored:
                raise CheckpointError(
                    f"{where}: the key-value cache is static, and tensor {key} is missing; copy "
                    "the checkpoint again, or calibrate again: ptq.quantize_cache(model, "
                    "{'mode': 'static'}, calibration=batches)"
                )
            found, shape = stored[key]
            ones = {"channel": 0, "head": 1, "tensor": 2}[axis]
            if found != dtype or len(shape) != 2 or shape[2 - ones :] != (1,) * ones:
                raise CheckpointError(
                    f"{where}: tensor {key} is {found} {list(shape)}, but the cache needs "
                    f"{dtype}, one per {axis}; the checkpoint is damaged, copy it again"
                )
            made[kind] = torch.empty(shape, dtype=dtype, device="meta")
        yield QParams(made["scale"], made.get("zero_point"))


def check_scales(model: nn.Module) -> None:
    """Every scale is a positive number.

    Raises:
        CheckpointError: the tensor is named.
    """
    for index, layer in (held_scales(model) or {}).items():
        for name in ("key_scale", "value_scale"):
            scale = layer._buffers[name]
            assert scale is not None
            if not bool((scale.float().isfinite() & (scale.float() > 0)).all()):
                raise CheckpointError(
                    f"tensor {SCALES}.{index}.{name} has scales that are not positive numbers; the "
                    "checkpoint is damaged, copy it again"
                )


def expected_scales(config: PretrainedConfig, settings: KVCacheConfig) -> dict[int, LayerScales]:
    """Those that calibration will make, on the meta device, as far as the config says the sizes of
    the heads; none for a dynamic cache."""
    text = config.get_text_config(decoder=True)
    all_heads = getattr(text, "num_attention_heads", None) or 0
    heads = getattr(text, "num_key_value_heads", None) or all_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // max(1, all_heads)
    if not settings.static:
        return {}

    def empty(axis: str) -> QParams:
        shape = scale_shape(axis, heads, width)
        zero_point = None if settings.symmetric else torch.empty(shape, dtype=torch.int8)
        return QParams(torch.empty(shape, dtype=torch_dtype(settings.scale_dtype)), zero_point)

    with torch.device("meta"):
        return {
            index: LayerScales(empty(settings.keys), empty(settings.values))
            for index in quantized_layers(config)
        }


def scale_shape(axis: str, heads: int, width: int) -> tuple[int, int]:
    """Of the scales of heads of this width."""
    return {"channel": (heads, width), "head": (heads, 1), "tensor": (1, 1)}[axis]
