"""The affine mapping between real numbers and integer codes.

``q = clamp(round(x / S) + Z, qmin, qmax)`` and ``x' = (q - Z) * S``; a floating-point code is the
nearest one to ``x / S``
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 2.1; rounding is half to even).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core.granularity import Granularity
from ptq.errors import UnsupportedError
from ptq.formats import Format, IntFormat


@dataclass(frozen=True)
class QParams:
    """Scale and zero point of the same shape; ``zero_point`` is None where it is zero by design."""

    scale: Tensor
    zero_point: Tensor | None


def choose_qparams(
    low: Tensor,
    high: Tensor,
    fmt: Format,
    *,
    symmetric: bool,
    signed_scale: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    power_of_two: bool = False,
) -> QParams:
    """A scale (and zero point) for which every x in [low, high] has ``|x - x'| <= |S| / 2``.

    - Symmetric (Z = 0): the codes of a signed format reach from -2^(b-1) to 2^(b-1) - 1/2 within
      half a step, so int4 takes ``max(|low|, |high|) / 7.5`` and uses all 16 codes.
    - Symmetric with a signed scale: S is negative where ``high > -low``, so that the end of larger
      magnitude is the code -2^(b-1), exactly: int4 takes that magnitude / 8 (or the other end's
      / 7.5, if that is more). This is how llama.cpp's Q4_0 chooses its scale.
    - Floating-point codes (symmetric only): the larger end is the largest code; the bound is half a
      unit in the last place instead.
    - Asymmetric: the range is first widened to contain zero, which is then exactly representable.

    Where low = high = 0 the scale is one. The magnitude of the scale is rounded *up* in
    ``scale_dtype``, so that the bound also holds for the scale that is stored.

    Args:
        low, high: any equal shapes, floating point, finite.
        signed_scale: only with a signed format and ``symmetric``.
        power_of_two: round the scale up to a power of two (fixed-point arithmetic).

    Returns:
        scale in ``scale_dtype``, zero point in ``fmt.dtype``, both shaped like ``low``.
    """
    low = low.double().clamp(max=0)
    high = high.double().clamp(min=0)
    assert isinstance(fmt, IntFormat) or (symmetric and not signed_scale)
    if not symmetric:
        scale = _round_up((high - low) / (fmt.qmax - fmt.qmin), scale_dtype, power_of_two)
        zero_point = (fmt.qmin - low / scale.double()).round().clamp(fmt.qmin, fmt.qmax)
        return QParams(scale, zero_point.to(fmt.dtype))
    if signed_scale:
        larger, smaller = torch.maximum(high, -low), torch.minimum(high, -low)
        exact = torch.maximum(larger / -fmt.qmin, smaller / (fmt.qmax + 0.5))
        scale = _round_up(exact, scale_dtype, power_of_two)
        return QParams(torch.where(high > -low, -scale, scale), None)
    below, above = fmt.reach
    exact = torch.maximum(high / above, -low / below)
    return QParams(_round_up(exact, scale_dtype, power_of_two), None)


def _round_up(exact: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """``exact`` (float64, >= 0) in ``dtype``, never smaller; one where it is zero.

    Raises:
        UnsupportedError: it is beyond what ``dtype`` can hold.
    """
    exact = torch.where(exact > 0, exact, torch.ones_like(exact))
    info = torch.finfo(dtype)
    # float16 is often subnormal at the scales of weights: coarse, but rounding up is never wrong.
    # A subnormal float32 or bfloat16 may be flushed to zero by a kernel.
    smallest = 2.0**-24 if dtype == torch.float16 else info.smallest_normal
    exact = exact.clamp(min=smallest)
    if power_of_two:
        exact = torch.exp2(torch.log2(exact).ceil())
    scale = exact.to(dtype)
    upward = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.double() < exact, upward, scale)
    if not bool(scale.isfinite().all()):
        raise UnsupportedError(
            f"a scale of {exact.max().item():.3g} is beyond {str(dtype).removeprefix('torch.')}; "
            "set weights.scale_dtype: float32"
        )
    return scale


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    fmt: Format,
    granularity: Granularity,
) -> Tensor:
    """Codes of x.

    Args:
        x: [R, C], floating point.
        scale: not zero, shaped ``granularity.scale_shape(x.shape)``.
        zero_point: same shape, or None for zero.

    Returns:
        [R, C] in ``fmt.dtype``.
    """
    parts = granularity.split(x.float()) / scale.float().unsqueeze(-1)
    if zero_point is not None:
        parts = parts.round_()
        parts += zero_point.float().unsqueeze(-1)
    return fmt.nearest(parts).to(fmt.dtype).reshape(x.shape)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    granularity: Granularity,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(codes - zero_point) * scale``, computed in float32, returned as [R, C] in ``dtype``."""
    parts = granularity.split(codes).float()
    if zero_point is not None:
        parts -= zero_point.float().unsqueeze(-1)
    parts *= scale.float().unsqueeze(-1)
    return parts.reshape(codes.shape).to(dtype)
