"""The quantized cache again, written the slow way: float states that are replaced, group by group,
by what their codes would be read as."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ptq.config import KVCacheConfig

E5M2 = torch.arange(1, 124, dtype=torch.uint8).view(torch.float8_e5m2).double()
"""All positive finite values of the dtype, ascending."""


def step_of(group: Tensor, settings: KVCacheConfig) -> float:
    """The distance of two codes for the elements that share it: the range in 2^b - 1 steps (of a
    symmetric code: half of them to each side of zero), as the next larger float8_e5m2."""
    low, high, levels = group.min().item(), group.max().item(), 2**settings.bits - 1
    if settings.symmetric:
        exact = 2 * max(high, -low) / levels
    elif settings.bits == 8:
        exact = (max(high, 0) - min(low, 0)) / levels
    else:
        exact = max((high - low) / levels, max(high, -low) / 112)
    # The library computes in float32.
    exact = float(torch.tensor(exact, dtype=torch.float32))
    return E5M2[exact <= E5M2].min().item()


def read_as(group: Tensor, settings: KVCacheConfig) -> Tensor:
    """The nearest of 2^b values that are ``step`` apart and reach from the smallest element up;
    zero is one of them."""
    step = step_of(group, settings)
    smallest, codes = group.double().min() / step, 2**settings.bits
    first = -codes // 2 if settings.symmetric else int(smallest.round())
    if settings.bits == 8 and not settings.symmetric:
        first = min(first, 0)
    return (group.double() / step).round().clamp(first, first + codes - 1) * step


def fake_quantized(x: Tensor, settings: KVCacheConfig, axis: str, size: int | None) -> Tensor:
    """States [B, H, T, D] as they are read again; loops over everything that has a scale."""
    made = x.clone()
    tokens, channels = (1, size or x.shape[3]) if axis == "token" else (size or 1, 1)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for t in range(0, x.shape[2], tokens):
                for d in range(0, x.shape[3], channels):
                    part = made[b, h, t : t + tokens, d : d + channels]
                    part.copy_(read_as(part, settings))
    return made


class FakeLayer(DynamicLayer):
    """A float layer; a group of tokens is replaced once ``window`` newer ones are there."""

    def __init__(self, settings: KVCacheConfig, sliding_window: int | None = None) -> None:
        super().__init__()
        self.settings, self.sliding_window = settings, sliding_window
        self.is_sliding = sliding_window is not None
        self.done = 0
        axes = ((settings.keys, settings.key_group_size),
                (settings.values, settings.value_group_size))  # fmt: skip
        self.step = max(1 if axis == "token" else size or 1 for axis, size in axes)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object):
        keys, values = super().update(key_states, value_states)
        if not self.settings.window:
            self.replace()
            keys, values = self.keys, self.values
        else:
            self.replace()
        if self.sliding_window is None:
            return keys, values
        visible = self.sliding_window - 1 + key_states.shape[2]
        return keys[:, :, -visible:], values[:, :, -visible:]

    def replace(self) -> None:
        """A new tensor, so that what was returned before stays float."""
        s = self.settings
        if self.sliding_window is not None and self.sliding_window <= s.window + self.step:
            return  # a group would have left it before it is whole
        end = self.done + max(0, self.keys.shape[2] - self.done - s.window) // self.step * self.step
        for name, axis, size in (
            ("keys", s.keys, s.key_group_size),
            ("values", s.values, s.value_group_size),
        ):
            whole = getattr(self, name).clone()
            old = whole[:, :, self.done : end]
            if old.numel():
                whole[:, :, self.done : end] = fake_quantized(old, s, axis, size)
            setattr(self, name, whole)
        self.done = end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.sliding_window is None:
            return super().get_mask_sizes(query_length)
        length = self.get_seq_length()
        offset = max(0, length - self.sliding_window + 1)
        return length - offset + query_length, offset


def fake_cache(like: Cache, settings: KVCacheConfig) -> Cache:
    """A cache with a layer for each one of ``like``."""
    return Cache(layers=[FakeLayer(settings, layer.sliding_window) for layer in like.layers])
