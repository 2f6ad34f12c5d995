"""The quantized keys and values of one attention layer, as transformers' caches have layers."""

import math

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ptq.config import KVCacheConfig, torch_dtype
from ptq.errors import UnsupportedError
from ptq.kv_cache.scales import LayerScales
from ptq.kv_cache.states import QuantizedStates, StateFormat


class QuantizedLayer(DynamicLayer):
    """Old tokens as codes, the newest in float (``keys`` and ``values``, as in a float layer).

    Tokens are quantized once, when ``window`` newer ones and a whole group are there, after the
    attention has seen them in float: 64 to 127 tokens are float with a window and groups of 64
    (Liu et al. 2024, KIVI, section 3.2). Without a window the attention reads what is kept, so it
    does not matter in what pieces tokens come, as long as they are whole groups. With static scales
    each token is a group.

    With ``sliding_window`` only the tokens that the next one can see are kept, and what fills up a
    group; all of them stay float if that is no more than the float window and one group.

    After :meth:`activate_past_recording` nothing is quantized or dropped before :meth:`crop`, so
    that assisted decoding can take tokens back as if they had never been there.
    """

    def __init__(
        self,
        settings: KVCacheConfig,
        sliding_window: int | None = None,
        scales: LayerScales | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formats = state_formats(settings, scales)
        self.window = settings.window
        self.step = math.lcm(*(fmt.tokens for fmt in self.formats))
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.stays_float = (
            sliding_window is not None and sliding_window - 1 < self.window + self.step
        )
        self.stored: tuple[QuantizedStates, QuantizedStates] | None = None
        self.seen = 0
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty states of these shapes but for the tokens.

        Raises:
            UnsupportedError: a group size, or static scales, do not fit the heads.
        """
        for fmt, name, states in zip(
            self.formats, ("key", "value"), (key_states, value_states), strict=True
        ):
            fmt.check(name, states.shape[-1], states.shape[1])
        keys, values = (fmt.on(key_states.device) for fmt in self.formats)
        self.formats = keys, values
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [B, H, T, D]; return all that the mask of these tokens is about, in float."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.seen += key_states.shape[2]
        self.keys = torch.cat((self.keys, key_states), 2)
        self.values = torch.cat((self.values, value_states), 2)
        if not self.window and not self.record_past:
            self._quantize_old()
        keys, values = self._read()
        if self.sliding_window is not None:
            visible = self.sliding_window - 1 + key_states.shape[2]
            keys, values = keys[:, :, -visible:], values[:, :, -visible:]
        if not self.record_past:
            self._settle()
        return keys, values

    def _read(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        if self.stored is None:
            return self.keys, self.values
        keys, values = (states.dequantize(self.dtype) for states in self.stored)
        if not self.keys.shape[2]:
            return keys, values
        return torch.cat((keys, self.keys), 2), torch.cat((values, self.values), 2)

    def _settle(self) -> None:
        """Quantize what has left the window, and drop what has left the sliding window."""
        self._quantize_old()
        if self.sliding_window is not None:
            self._slide(self.sliding_window - 1)

    def _quantize_old(self) -> None:
        assert self.keys is not None and self.values is not None
        whole = max(0, self.keys.shape[2] - self.window) // self.step * self.step
        if whole and not self.stays_float:
            states = self.keys[:, :, :whole], self.values[:, :, :whole]
            newer = [fmt.quantize(x) for fmt, x in zip(self.formats, states, strict=True)]
            if self.stored is not None:
                newer = [old.append(new) for old, new in zip(self.stored, newer, strict=True)]
            self.stored = newer[0], newer[1]
            # A view would hold the memory of all tokens.
            self.keys = self.keys[:, :, whole:].clone()
            self.values = self.values[:, :, whole:].clone()

    def _slide(self, visible: int) -> None:
        assert self.keys is not None and self.values is not None
        if self.stored is not None:
            length = self.stored[0].length
            surplus = length + self.keys.shape[2] - visible
            unseen = min(length, max(0, surplus) // self.step * self.step)
            if unseen:
                keys, values = (states.take(unseen, length) for states in self.stored)
                self.stored = (keys, values) if keys.length else None
        if self.stored is None:
            surplus = max(0, self.keys.shape[2] - visible)
            self.keys, self.values = self.keys[:, :, surplus:], self.values[:, :, surplus:]

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of what :meth:`update` will return, and the position of its first token."""
        offset = 0
        if self.sliding_window is not None:
            offset = max(self.seen - self.sliding_window + 1, 0)
        return self.seen - offset + query_length, offset

    def activate_past_recording(self) -> None:
        """Keep every new token in float until :meth:`crop` says which of them stay."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; the number is given as a negative one.

        Raises:
            UnsupportedError: they are quantized already, and not whole groups; or a sliding window
                has dropped what would come back. Nothing was changed.
        """
        if tokens_to_remove > 0:
            raise UnsupportedError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative one"
            )
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        count, recent = min(-tokens_to_remove, self.seen), self.keys.shape[2]
        older = max(0, count - recent)
        self._check_crop(count, older)
        if older:
            assert self.stored is not None
            keys, values = (states.take(0, states.length - older) for states in self.stored)
            self.stored = (keys, values) if keys.length else None
        kept = max(0, recent - count)
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        self.seen -= count
        self._settle()

    def _check_crop(self, count: int, older: int) -> None:
        if older % self.step:
            raise UnsupportedError(
                f"crop(-{count}) would cut a quantized group of {self.step} tokens in two; call "
                "cache.activate_past_recording() before those tokens come, or crop to a multiple "
                f"of {self.step}"
            )
        full = self.sliding_window is not None and self.seen >= self.sliding_window
        if count and full and (older or not self.record_past):
            raise UnsupportedError(
                f"crop(-{count}) after the sliding window of {self.sliding_window} tokens is full "
                "needs tokens that were dropped; call cache.activate_past_recording() before"
            )

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.stored, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences of the batch in this order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        if self.is_initialized:
            assert self.keys is not None
            rows = torch.arange(self.keys.shape[0], device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        self.keys = self.keys[indices.to(self.device)]
        self.values = self.values[indices.to(self.device)]
        if self.stored is not None:
            keys, values = (states.select(indices) for states in self.stored)
            self.stored = keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        floats = [t.nbytes for t in (self.keys, self.values) if t is not None]
        return sum(floats) + sum(states.nbytes for states in self.stored or ())

    @property
    def numel(self) -> int:
        """Elements of the keys and values that are kept, float or not."""
        floats = [t.numel() for t in (self.keys, self.values) if t is not None]
        return sum(floats) + sum(states.numel for states in self.stored or ())


def state_formats(
    settings: KVCacheConfig, scales: LayerScales | None = None
) -> tuple[StateFormat, StateFormat]:
    """How keys and values are stored.

    Args:
        scales: of a static cache; without them, its formats are for checks only.
    """
    pairs = (
        (settings.keys, settings.key_group_size),
        (settings.values, settings.value_group_size),
    )
    static = (None, None) if scales is None else scales.pair
    keys, values = (
        StateFormat(
            settings.bits,
            *_block(axis, size, settings.static),
            settings.symmetric,
            torch_dtype(settings.scale_dtype),
            found,
        )
        for (axis, size), found in zip(pairs, static, strict=True)
    )
    return keys, values


def _block(axis: str, size: int | None, static: bool) -> tuple[int, int | None]:
    """Tokens and channels that share a scale; of a static one, channels, whatever the tokens."""
    if static:
        return 1, 1 if axis == "channel" else None
    return (1, size) if axis == "token" else (size or 1, 1)
