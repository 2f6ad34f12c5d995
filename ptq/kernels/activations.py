"""Activations on their way into a kernel: float, or quantized to int8 or float8."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.config import ActivationScheme
from ptq.formats import FORMATS, FloatFormat
from ptq.kernels.triton_launch import quantize_rows
from ptq.kernels.triton_ready import triton_reason
from ptq.native import ready

_CHUNK = 1 << 18  # elements: their float32 values fit a core's cache
_SMALLEST = torch.finfo(torch.float32).smallest_normal  # a scale


@dataclass(frozen=True)
class Activation:
    """x [M, K], float (``scale`` is None) or codes: ``x = (values - zero_point) * scale``.

    Args:
        values: floating point, or codes: in the format's dtype for kernels that multiply codes,
            else in a wider float dtype.
        scale: float32 [M, 1] (per token) or [1, 1] (per tensor).
        zero_point: int32, shaped like scale; None for zero.
    """

    values: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def as_float(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Values in ``dtype`` and the scale that is still to be applied to the product's rows.

        Codes without a zero point are exact in bfloat16 and float16; with one, bfloat16 rounds
        differences above 256 to even ones.
        """
        if self.zero_point is None:
            same = self.values.dtype == dtype  # asking is faster than a conversion to the same
            return self.values if same else self.values.to(dtype), self.scale
        return (self.values - self.zero_point).to(dtype), self.scale

    def dequantize(self) -> Tensor:
        """x in float32."""
        values, scale = self.as_float(torch.float32)
        return values if scale is None else values * scale


def quantize_activation(
    x: Tensor,
    scheme: ActivationScheme | None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Activation:
    """Quantize x [M, K] as the scheme says.

    Dynamic: one scale per row, ``max|x| / 127`` (symmetric) or ``(max - min) / 255`` with a
    zero point, so every element is within half a step. Static: the given scalar scale and zero
    point; what lies outside saturates, and NaN becomes some code (a dynamic scale keeps it).

    float8: one scale per row, ``max|x| / 448``.

    Args:
        dtype: of the codes (default: the format's own); a wider float dtype where a float kernel
            would convert them back.
    """
    if scheme is None:
        return Activation(x)
    fmt = FORMATS[scheme.format]
    dtype = dtype or fmt.dtype
    if isinstance(fmt, FloatFormat):
        codes, scale = by_chunks(lambda part: float_codes(part, fmt), x, dtype)
        return Activation(codes, scale)
    if scheme.mode == "dynamic" and scheme.symmetric:
        if _in_one_pass(x, dtype):
            quantize = torch.ops.ptq.quantize_rows if x.device.type == "cpu" else quantize_rows
            return Activation(*quantize(x.contiguous(), dtype))
        codes, scale = by_chunks(lambda part: symmetric_codes(part, 127), x, dtype)
        return Activation(codes, scale)
    values = x.float()
    if scheme.mode == "static":
        assert input_scale is not None
        zero_point = None if input_zero_point is None else input_zero_point.reshape(1, 1)
        codes = _codes(values, input_scale.reshape(1, 1), zero_point).clamp_(-128, 127)
        return Activation(codes.to(dtype), input_scale.reshape(1, 1), zero_point)
    low = values.amin(dim=-1, keepdim=True).clamp_(max=0)
    high = values.amax(dim=-1, keepdim=True).clamp_(min=0)
    scale = ((high - low) / 255).clamp_(min=_SMALLEST)
    zero_point = (-128 - low / scale).round_().clamp_(-128, 127).to(torch.int32)
    codes = _codes(values, scale, zero_point).clamp_(-128, 127)
    return Activation(codes.to(dtype), scale, zero_point)


def _in_one_pass(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether ptq's own op quantizes x, to the same bits; compilers make one pass themselves."""
    if torch.compiler.is_compiling() or x.numel() == 0:
        return False
    if x.device.type == "cuda":
        return triton_reason() is None and x.dtype != torch.float64
    fits = x.dtype in (torch.float32, torch.bfloat16) and dtype in (torch.int8, torch.bfloat16)
    return x.device.type == "cpu" and fits and ready()


def symmetric_codes(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from -largest to largest (float32 [M, K]) and their scale [M, 1], by row.

    Args:
        x: floating point [M, K].
    """
    scale = _row_scale(x, largest)
    return torch.div(x.float(), scale).round_(), scale


def float_codes(x: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Codes of a floating-point format, as float32 [M, K], and their scale [M, 1], by row.

    Args:
        x: floating point [M, K].
    """
    scale = _row_scale(x, fmt.qmax)
    return fmt.nearest(torch.div(x.float(), scale)), scale


def _row_scale(x: Tensor, largest: float) -> Tensor:
    """float32 [M, 1]: what makes the largest magnitude of a row ``largest``."""
    # vector_norm(inf) and aminmax take ten times as long on a CPU.
    return x.abs().amax(dim=-1, keepdim=True).float().div_(largest).clamp_(min=_SMALLEST)


def by_chunks(
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes of x [M, K] in ``dtype`` and scales float32 [M, 1], some rows at a time.

    The intermediate values of a large x would be new memory in each call, and getting that takes
    four times as long as the arithmetic (512 x 8192: 10.4 against 2.1 ms).
    """
    rows = max(1, _CHUNK // max(1, x.shape[1]))
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.shape[0] <= rows:
        codes, scale = quantize(x)
        return codes.to(dtype), scale
    codes = torch.empty(x.shape, dtype=dtype)
    scale = torch.empty((x.shape[0], 1))
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        codes[part], scale[part] = quantize(x[part])
    return codes, scale


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """``round(x / scale) + zero_point`` in float32."""
    codes = torch.div(x, scale).round_()
    return codes if zero_point is None else codes.add_(zero_point)


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where it was that."""
    return torch.promote_types(dtype, torch.float32)


def scaled(y: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A kernel's own product y [M, N] (changed in place) times the float32 scale of its rows
    [M, 1] or columns [1, N], in ``dtype``; computed in float32."""
    if scale is None:
        return y.to(dtype)
    return y.to(widened(y.dtype)).mul_(scale).to(dtype)
