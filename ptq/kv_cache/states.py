"""Keys or values as integer codes: quantized once, kept, and made float again when they are read.

``x' = (q - Z) * S`` as in :mod:`ptq.core.affine`, with two differences. What shares a scale is a
block of tokens by channels, and the zero point of four-bit codes may lie outside of them: keys of
one channel often all have the same sign, and a range that must contain zero would waste codes.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ptq.errors import UnsupportedError
from ptq.formats import FORMATS

_OUTSIDE = 112  # steps from zero that an int8 zero point of 4-bit codes can reach, with a margin
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_SUBNORMAL = {torch.float8_e5m2: 2.0**-16, torch.float16: 2.0**-24}


@dataclass(frozen=True)
class QParams:
    """Scales and zero points.

    Args:
        scale: of any shape; a static one, for all tokens, is [H, D / channels], with 1 for H where
            all heads share it.
        zero_point: int8, likewise, or None.
    """

    scale: Tensor
    zero_point: Tensor | None

    def as_blocks(self) -> "QParams":
        """[1, H, 1, 1, D / channels, 1], as blocks of states have them."""
        shape = (1, self.scale.shape[0], 1, 1, self.scale.shape[1], 1)
        zero_point = None if self.zero_point is None else self.zero_point.reshape(shape)
        return QParams(self.scale.reshape(shape), zero_point)

    def to(self, device: torch.device) -> "QParams":
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return QParams(self.scale.to(device), zero_point)


@dataclass(frozen=True)
class StateFormat:
    """How states [B, H, T, D] are stored.

    Args:
        bits: 4 or 8.
        tokens: consecutive tokens that share a scale.
        channels: channels that share a scale; None for all D.
        symmetric: without zero points.
        scale_dtype: of the stored scales.
        static: the scale of all tokens, whatever they are; None: each block has its own.
    """

    bits: int
    tokens: int
    channels: int | None
    symmetric: bool
    scale_dtype: torch.dtype
    static: QParams | None = field(default=None, compare=False)

    def on(self, device: torch.device) -> "StateFormat":
        """With its static scale on this device."""
        return self if self.static is None else replace(self, static=self.static.to(device))

    def check(self, name: str, width: int, heads: int | None = None) -> None:
        """Whether heads of this width can be stored.

        Args:
            name: ``key`` or ``value``.
            heads: how many there are, if that is known.

        Raises:
            UnsupportedError: they cannot.
        """
        if self.static is not None and heads is not None:
            shape = tuple(self.static.scale.shape)
            if shape[0] not in (1, heads) or shape[1] not in (1, width):
                raise UnsupportedError(
                    f"the cache has static {name} scales {list(shape)}, and the model's {name}s "
                    f"have {heads} heads of {width} channels; calibrate them with this model"
                )
        if self.channels is not None and width % self.channels:
            raise UnsupportedError(
                f"kv_cache.{name}_group_size {self.channels} does not divide the head's {width} "
                f"channels; choose a divisor, or leave it out for one scale per head"
            )
        if self.bits == 4 and width % 2:
            raise UnsupportedError(
                f"kv_cache.bits 4: heads of {width} channels do not fill whole bytes; choose 8"
            )

    def blocks(self, x: Tensor) -> Tensor:
        """States [B, H, T, D] as [B, H, T / tokens, tokens, D / channels, channels]."""
        batch, heads, length, width = x.shape
        channels = self.channels or width
        shape = (length // self.tokens, self.tokens, width // channels, channels)
        return x.reshape(batch, heads, *shape)

    def quantize(self, x: Tensor) -> "QuantizedStates":
        """Codes of states [B, H, T, D], where T is a multiple of ``tokens``.

        Every element is within half a step of its stored scale (and the rounding of x's own dtype);
        beyond the range of a static scale it becomes the outermost code.
        """
        parts = self.blocks(x.float())
        if self.static is None:
            made = self.qparams(parts.amin((3, 5), True), parts.amax((3, 5), True))
        else:
            made = self.static.as_blocks()
        scale, zero_point = made.scale, made.zero_point
        fmt = FORMATS[f"int{self.bits}"]
        codes = (parts / scale.float()).round_()
        if zero_point is not None:
            codes += zero_point.float()
        codes = codes.clamp_(fmt.qmin, fmt.qmax).to(fmt.dtype).reshape(x.shape)
        if self.bits == 4:  # one byte has a channel of the first half and its like of the second
            low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
            codes = low | high << 4
        return QuantizedStates(self, codes, scale, zero_point)

    def qparams(self, low: Tensor, high: Tensor) -> QParams:
        """The scale and zero point, of the shape of ``low`` and ``high`` (float32), that reach from
        the one to the other."""
        fmt = FORMATS[f"int{self.bits}"]
        largest = torch.maximum(high, -low)
        if self.symmetric:
            return QParams(_round_up(largest / (fmt.qmax + 0.5), self.scale_dtype), None)
        if self.bits == 8:
            low, high = low.clamp(max=0), high.clamp(min=0)
        exact = (high - low) / (fmt.qmax - fmt.qmin)
        if self.bits == 4:
            exact = torch.maximum(exact, largest / _OUTSIDE)
        scale = _round_up(exact, self.scale_dtype)
        zero_point = fmt.qmin - (low / scale.float()).round()
        return QParams(scale, zero_point.clamp_(-128, 127).to(torch.int8))


@dataclass(frozen=True)
class QuantizedStates:
    """Codes with their scales and zero points; B, H, T and D as in :class:`StateFormat`.

    Args:
        codes: int8 [B, H, T, D]; of 4 bits uint8 [B, H, T, D / 2].
        scale: [B, H, T / tokens, 1, D / channels, 1]; a static one, which is the model's and not
            kept here, [1, H or 1, 1, 1, D / channels, 1].
        zero_point: int8, likewise, or None.
    """

    format: StateFormat
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @property
    def length(self) -> int:
        """Tokens."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def numel(self) -> int:
        """Codes."""
        return self.codes.nbytes * 8 // self.format.bits

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """States [B, H, T, D] in ``dtype``."""
        # Differences of codes are exact in every dtype. So is a scale in its own or a wider one.
        exact = self.scale.dtype in (torch.float8_e5m2, dtype)
        wide = dtype if exact else torch.float32
        codes, scale = self.codes, self.scale.to(wide)
        zero_point = None if self.zero_point is None else self.zero_point.to(wide)
        if self.format.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), -1)  # offset by 8, as packing does
            zero_point = scale.new_full((1,), 8) if zero_point is None else zero_point + 8
        parts = self.format.blocks(codes)
        found = parts * scale if zero_point is None else (parts - zero_point) * scale
        return found.reshape(codes.shape).to(dtype)

    def append(self, newer: "QuantizedStates") -> "QuantizedStates":
        """With the tokens of ``newer`` behind."""
        other = newer.tensors()
        return self._with({n: torch.cat((t, other[n]), 2) for n, t in self.tensors().items()})

    def take(self, first: int, last: int) -> "QuantizedStates":
        """The tokens from ``first`` to before ``last``, both multiples of ``format.tokens``."""
        step = self.format.tokens
        taken = {
            name: tensor[:, :, first // step : last // step].clone()
            for name, tensor in self.tensors().items()
        }
        return self._with({**taken, "codes": self.codes[:, :, first:last].clone()})

    def select(self, rows: Tensor) -> "QuantizedStates":
        """The sequences of the batch with these indices (or a mask of them)."""
        return self._with({n: t[rows.to(t.device)] for n, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """What is kept of the tokens, by name."""
        if self.format.static is not None:
            return {"codes": self.codes}
        zero_point = {} if self.zero_point is None else {"zero_point": self.zero_point}
        return {"codes": self.codes, "scale": self.scale, **zero_point}

    def _with(self, tensors: dict[str, Any]) -> "QuantizedStates":
        return replace(self, **tensors)


def _round_up(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact`` (float32, >= 0) in ``dtype``, positive and never smaller.

    Positive floats have the order of their bits, so the next one is one bit pattern further.
    """
    exact = exact.clamp(min=_SUBNORMAL.get(dtype, torch.finfo(dtype).smallest_normal))
    scale = exact.to(dtype)
    bits = scale.view(_WORDS[dtype.itemsize])
    return (bits + (scale.float() < exact).to(bits.dtype)).view(dtype)
