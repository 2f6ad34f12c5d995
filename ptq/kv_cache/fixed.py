"""Quantized keys and values in tensors of a fixed size, for compiled decoding.

The same codes and floats as :class:`ptq.kv_cache.layer.QuantizedLayer` keeps, without a branch on
the number of tokens: in a decoding step the newest group is quantized whether it is whole or not,
and which tokens are read as codes is a comparison of positions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import StaticCache, StaticLayer

from ptq.config import KVCacheConfig
from ptq.errors import UnsupportedError
from ptq.kv_cache.layer import state_formats
from ptq.kv_cache.scales import LayerScales, quantized_layers
from ptq.kv_cache.states import QParams, QuantizedStates, StateFormat

Spec = tuple[int, int, int | None, bool, bool]
"""Of keys or values: the first fields of a :class:`StateFormat`, and whether it is static."""


@dataclass(frozen=True)
class FixedStates:
    """Keys or values; B, H, T and D as in :class:`StateFormat`, L the tokens that have room.

    Args:
        stored: codes of L tokens; what is not quantized yet has arbitrary ones.
        recent: [B, H, R, D], the newest floats: of position t at t modulo R.
    """

    stored: QuantizedStates
    recent: Tensor

    @classmethod
    def empty(cls, fmt: StateFormat, like: Tensor, length: int, recent: int) -> "FixedStates":
        batch, heads, _, width = like.shape
        stored = fmt.quantize(like.new_zeros(batch, heads, length, width))
        return cls(stored, like.new_zeros(batch, heads, recent, width))

    def keep(self, states: Tensor, positions: Tensor) -> None:
        """Keep the newest floats."""
        self.recent.index_copy_(2, positions % self.recent.shape[2], states)

    def write(self, states: Tensor, positions: Tensor) -> None:
        """Quantize whole groups of tokens, at these positions."""
        made = self.stored.format.quantize(states)
        step = self.stored.format.tokens
        for name, tensor in self.stored.tensors().items():
            where = positions if name == "codes" else positions[::step] // step
            new = made.tensors()[name]
            _plain(tensor).index_copy_(2, where, _plain(new))

    def group(self, positions: Tensor) -> Tensor:
        """The floats of these positions, which are among the newest."""
        return self.recent.index_select(2, positions % self.recent.shape[2])

    def read(self, dtype: torch.dtype, quantized: Tensor) -> Tensor:
        """All tokens in ``dtype``, the first ``quantized`` of them from their codes."""
        found = self.stored.dequantize(dtype)
        positions = torch.arange(found.shape[2], device=found.device)
        return torch.where((positions < quantized)[:, None], found, self.group(positions))

    def select(self, rows: Tensor) -> "FixedStates":
        """The sequences of the batch with these indices."""
        return FixedStates(self.stored.select(rows), self.recent.index_select(0, rows))

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept of the tokens."""
        return [*self.stored.tensors().values(), self.recent]

    def parts(self) -> list[Tensor]:
        """All tensors that it computes with, a static scale as well."""
        static = self.stored.format.static
        found = QParams(self.stored.scale, self.stored.zero_point) if static is None else static
        zero_point = [] if found.zero_point is None else [found.zero_point]
        return [self.recent, self.stored.codes, found.scale, *zero_point]

    @classmethod
    def of(cls, spec: Spec, parts: Sequence[Tensor]) -> "FixedStates":
        """What has this spec and these :meth:`parts`."""
        recent, codes, scale, *zero_point = parts
        made = QParams(scale, zero_point[0] if zero_point else None)
        bits, tokens, channels, symmetric, static = spec
        own = made if static else None
        fmt = StateFormat(bits, tokens, channels, symmetric, scale.dtype, own)
        if static:
            made = made.as_blocks()
        return cls(QuantizedStates(fmt, codes, made.scale, made.zero_point), recent)

    @property
    def spec(self) -> Spec:
        """What it is beside its tensors."""
        fmt = self.stored.format
        return fmt.bits, fmt.tokens, fmt.channels, fmt.symmetric, fmt.static is not None


def _plain(tensor: Tensor) -> Tensor:
    """Floats of 8 bits as integers, which can be indexed everywhere."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e5m2 else tensor


def make_fixed(
    cache: StaticCache,
    config: PretrainedConfig,
    settings: KVCacheConfig,
    scales: Mapping[int, LayerScales] | None,
) -> None:
    """Quantize the keys and values that an empty cache of transformers will hold.

    Args:
        config: of the model that the cache is for.
        settings, scales: as of :class:`ptq.kv_cache.cache.QuantizedCache`.

    Raises:
        UnsupportedError: a layer has a sliding window, or attention in chunks.
    """
    for index in quantized_layers(config):
        layer = cache.layers[index]
        if type(layer) is not StaticLayer:
            raise UnsupportedError(
                f"layer {index} of this {config.model_type} model has a sliding window or "
                "attention in chunks, whose quantized cache is not for compiled decoding: call "
                "ptq.quantize_cache(model, None) first"
            )
        own = None if scales is None else scales[index]
        cache.layers[index] = FixedLayer(settings, layer.max_cache_len, own)


class FixedLayer(StaticLayer):
    """A quantized layer of a cache of fixed size.

    Args:
        settings, scales: as of :class:`ptq.kv_cache.layer.QuantizedLayer`.
        max_cache_len: tokens that there is room for; rounded up to whole groups.
    """

    def __init__(
        self, settings: KVCacheConfig, max_cache_len: int, scales: LayerScales | None = None
    ) -> None:
        self.formats = state_formats(settings, scales)
        self.window = settings.window
        self.step = math.lcm(*(fmt.tokens for fmt in self.formats))
        length = -(-max_cache_len // self.step) * self.step
        super().__init__(length)  # type: ignore[no-untyped-call]
        self.states: tuple[FixedStates, FixedStates] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for states of these shapes but for the tokens.

        Raises:
            UnsupportedError: a group size, or static scales, do not fit the heads.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        # A group is quantized when ``window`` newer tokens are there; until then all are float.
        recent = (-(-self.window // self.step) + 1) * self.step
        made = []
        for fmt, name, states in zip(
            self.formats, ("key", "value"), (key_states, value_states), strict=True
        ):
            fmt.check(name, states.shape[-1], states.shape[1])
            made.append(FixedStates.empty(fmt.on(self.device), states, self.max_cache_len, recent))
        self.states = made[0], made[1]
        self.cumulative_length = self.cumulative_length.to(self.device)
        for tensor in self.parts():  # as transformers does, else a CUDA graph cannot write to them
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add tokens [B, H, T, D]; return all L, in float; those to come are arbitrary.

        Raises:
            UnsupportedError: several tokens come when there are some already.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.states is not None
        if key_states.shape[2] != 1:
            return self._prompt(key_states, value_states)
        position = self.cumulative_length.clone()
        self.cumulative_length.add_(1)
        group = torch.arange(self.step, device=self.device)
        leaves = position - self.window  # the token that leaves the window, and its group
        last = leaves.clamp(min=0) // self.step * self.step + group
        quantized = (leaves if self.window else leaves + 1) // self.step * self.step
        found = []
        for states, new in zip(self.states, (key_states, value_states), strict=True):
            states.keep(new, position.reshape(1))
            states.write(states.group(last), last)
            found.append(states.read(self.dtype, quantized))
        return found[0], found[1]

    def _prompt(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The first tokens, outside of the graph: a window is float for them, as it is for
        :class:`ptq.kv_cache.layer.QuantizedLayer`."""
        assert self.states is not None
        length = key_states.shape[2]
        if int(self.cumulative_length):
            raise UnsupportedError(
                "compiled decoding with a quantized cache takes a prompt in one piece: leave out "
                "prefill_chunk_size"
            )
        self.cumulative_length.add_(length)
        whole = max(0, length - self.window) // self.step * self.step
        positions = torch.arange(length, device=self.device)
        found = []
        for states, new in zip(self.states, (key_states, value_states), strict=True):
            newest = positions[-states.recent.shape[2] :]
            states.keep(new[:, :, newest], newest)
            if whole:
                states.write(new[:, :, :whole], positions[:whole])
            read = new
            if whole and not self.window:
                read = torch.cat((self._codes(states, whole), new[:, :, whole:]), 2)
            room = read.new_zeros(*read.shape[:2], self.max_cache_len - length, read.shape[3])
            found.append(torch.cat((read, room), 2))
        return found[0], found[1]

    def _codes(self, states: FixedStates, count: int) -> Tensor:
        return states.stored.take(0, count).dequantize(self.dtype)

    def parts(self) -> list[Tensor]:
        """All tensors that it computes with: the length, and those of keys and values."""
        assert self.states is not None
        keys, values = self.states
        return [self.cumulative_length, *keys.parts(), *values.parts()]

    @property
    def spec(self) -> tuple[int, int, Spec, Spec]:
        """What the layer is beside its tensors, in constants that a compiler can compare."""
        assert self.states is not None
        keys, values = self.states
        return self.window, self.step, keys.spec, values.spec

    @classmethod
    def of(cls, spec: tuple[int, int, Spec, Spec], parts: Sequence[Tensor]) -> "FixedLayer":
        """A layer that has this spec and these :meth:`parts`."""
        made: FixedLayer = object.__new__(cls)
        made.window, made.step, *kinds = spec
        length, *rest = parts
        count = len(rest) // 2  # both have zero points, or neither
        keys = FixedStates.of(kinds[0], rest[:count])
        values = FixedStates.of(kinds[1], rest[count:])
        made.cumulative_length, made.states = length, (keys, values)
        made.dtype, made.device = keys.recent.dtype, keys.recent.device
        made.max_cache_len = keys.stored.length
        made.is_initialized = True
        return made

    def reset(self) -> None:
        """Forget every token."""
        self.states, self.is_initialized = None, False
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences of the batch in this order."""
        if self.states is not None:
            rows = beam_idx.to(self.device)
            keys, values = (states.select(rows) for states in self.states)
            self.states = keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for states in self.states or () for t in states.tensors)
