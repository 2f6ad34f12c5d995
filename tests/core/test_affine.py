"""The affine mapping against its definition, in exact arithmetic, and against torch's own."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.core import Granularity, choose_qparams, dequantize, quantize
from ptq.formats import INTEGERS, IntFormat

CHANNEL = Granularity("channel")
TENSOR = Granularity("tensor")
INT8, UINT8, INT4 = INTEGERS["int8"], INTEGERS["uint8"], INTEGERS["int4"]
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
magnitudes = st.floats(2.0**-10, 2.0**10, width=32)


def ranges(low: float, high: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([[low]]), torch.tensor([[high]])


def by_definition(x: float, scale: float, zero: int, fmt: IntFormat) -> int:
    """q = clamp(round(x / S) + Z, qmin, qmax), in fractions; Python's round is half to even too."""
    return max(fmt.qmin, min(fmt.qmax, round(Fraction(x) / Fraction(scale)) + zero))


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    exponent=st.integers(-6, 3),
    zero=st.integers(-128, 127),
    fmt=st.sampled_from(list(INTEGERS.values())),
)
def test_codes_are_those_of_the_definition(
    values: list[float], exponent: int, zero: int, fmt: IntFormat
) -> None:
    """With a scale that is a power of two x / S is exact in float32, so the codes are too."""
    zero = max(fmt.qmin, min(fmt.qmax, zero))
    scale = torch.tensor([[2.0**exponent]])
    zero_point = torch.tensor([[zero]], dtype=fmt.dtype)
    codes = quantize(torch.tensor([values]), scale, zero_point, fmt, TENSOR)
    assert codes.dtype == fmt.dtype
    expected = [by_definition(v, 2.0**exponent, zero, fmt) for v in values]
    assert codes[0].tolist() == expected
    back = dequantize(codes, scale, zero_point, TENSOR)
    assert back[0].tolist() == [(q - zero) * 2.0**exponent for q in expected]


@settings(max_examples=300, deadline=None)
@given(
    a=magnitudes,
    b=magnitudes,
    signs=st.sampled_from([(-1, 1), (1, 1), (-1, -1)]),
    fmt=st.sampled_from(list(INTEGERS.values())),
    kind=st.sampled_from(["symmetric", "signed", "asymmetric"]),
    dtype=st.sampled_from(SCALE_DTYPES),
    power_of_two=st.booleans(),
)
def test_every_value_in_the_range_is_within_half_a_step(
    a: float,
    b: float,
    signs: tuple[int, int],
    fmt: IntFormat,
    kind: str,
    dtype: torch.dtype,
    power_of_two: bool,
) -> None:
    """Also where the range does not contain zero: it is widened to it."""
    low, high = sorted((signs[0] * a, signs[1] * b))
    if kind == "signed" and not fmt.signed:
        return
    if kind == "symmetric" and not fmt.signed:
        low = max(low, 0.0)  # an unsigned code with Z = 0 stands for no negative number
        high = max(high, 2.0**-10)
    qparams = choose_qparams(
        *ranges(low, high),
        fmt,
        symmetric=kind != "asymmetric",
        signed_scale=kind == "signed",
        scale_dtype=dtype,
        power_of_two=power_of_two,
    )
    assert qparams.scale.dtype == dtype
    scale = abs(qparams.scale.item())
    x = torch.linspace(low, high, 101).clamp(low, high)[None]
    codes = quantize(x, qparams.scale, qparams.zero_point, fmt, TENSOR)
    back = dequantize(codes, qparams.scale, qparams.zero_point, TENSOR)
    # Half a step, plus what float32 rounds: x / S in units of the last place, and x' itself.
    units = 3 * torch.finfo(torch.float32).eps * (x.abs() + scale)
    assert ((back - x).abs() <= scale / 2 + units).all()


@settings(max_examples=100, deadline=None)
@given(
    low=st.floats(-100, 100, width=32),
    high=st.floats(-100, 100, width=32),
    fmt=st.sampled_from(list(INTEGERS.values())),
    symmetric=st.booleans(),
)
def test_zero_is_exact(low: float, high: float, fmt: IntFormat, symmetric: bool) -> None:
    low, high = min(low, high), max(low, high)
    qparams = choose_qparams(*ranges(low, high), fmt, symmetric=symmetric)
    assert (qparams.zero_point is None) == symmetric
    zero = torch.zeros(1, 1)
    codes = quantize(zero, qparams.scale, qparams.zero_point, fmt, TENSOR)
    assert dequantize(codes, qparams.scale, qparams.zero_point, TENSOR).item() == 0.0


@pytest.mark.parametrize("kind", ["symmetric", "signed", "asymmetric"])
@pytest.mark.parametrize("constant", [0.0, 1e-30, -1e-42, 3.0, -5.0])
def test_constant_channels(kind: str, constant: float) -> None:
    low, high = ranges(constant, constant)
    qparams = choose_qparams(
        low, high, INT8, symmetric=kind != "asymmetric", signed_scale=kind == "signed"
    )
    assert qparams.scale.isfinite().all()
    assert (qparams.scale != 0).all()
    codes = quantize(low, qparams.scale, qparams.zero_point, INT8, TENSOR)
    back = dequantize(codes, qparams.scale, qparams.zero_point, TENSOR)
    assert (back - low).abs().item() <= abs(qparams.scale.item()) * 0.5001


def test_the_signed_scale_puts_the_larger_end_on_the_extra_code() -> None:
    low, high = torch.tensor([[-1.0], [-8.0]]), torch.tensor([[8.0], [1.0]])
    qparams = choose_qparams(low, high, INT4, symmetric=True, signed_scale=True)
    assert qparams.scale.flatten().tolist() == [-1.0, 1.0]
    largest = torch.tensor([[8.0], [-8.0]])
    codes = quantize(largest, qparams.scale, None, INT4, CHANNEL)
    assert codes.flatten().tolist() == [-8, -8]
    assert torch.equal(dequantize(codes, qparams.scale, None, CHANNEL), largest)


def test_the_signed_scale_has_a_smaller_step_than_the_positive_one() -> None:
    low, high = ranges(-0.5, 1.0)
    signed = choose_qparams(low, high, INT4, symmetric=True, signed_scale=True)
    positive = choose_qparams(low, high, INT4, symmetric=True)
    assert abs(signed.scale.item()) == 1 / 8
    assert positive.scale.item() == pytest.approx(1 / 7.5)


def test_fixed_point_is_the_special_case_of_a_power_of_two() -> None:
    """int8 with scale 1/128 (Q0.7) covers [-1, 127/128], exactly, and saturates beyond."""
    scale = torch.tensor([[1 / 128]])
    representable = torch.arange(-128, 128).float()[None] / 128
    codes = quantize(representable, scale, None, INT8, TENSOR)
    assert codes[0].tolist() == list(range(-128, 128))
    assert torch.equal(dequantize(codes, scale, None, TENSOR), representable)
    outside = torch.tensor([[-7.0, -1.01, 1.0, 7.0]])
    saturated = dequantize(quantize(outside, scale, None, INT8, TENSOR), scale, None, TENSOR)
    assert saturated[0].tolist() == [-1.0, -1.0, 127 / 128, 127 / 128]


@pytest.mark.parametrize("symmetric", [True, False])
def test_power_of_two_scales_are_powers_of_two(symmetric: bool) -> None:
    low, high = -torch.rand(50, 1), torch.rand(50, 1) * 100
    made = choose_qparams(low, high, INT8, symmetric=symmetric, power_of_two=True)
    assert (made.scale.frexp().mantissa == 0.5).all()
    exact = choose_qparams(low, high, INT8, symmetric=symmetric)
    assert (made.scale >= exact.scale).all()
    assert (made.scale < 2 * exact.scale * (1 + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 40),
    symmetric=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_agrees_with_torch_per_channel(rows: int, columns: int, symmetric: bool, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    made = choose_qparams(low, high, INT8, symmetric=symmetric)
    zero = torch.zeros(rows, dtype=torch.int32)
    if made.zero_point is not None:
        zero = made.zero_point.flatten().to(torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, made.scale.flatten(), zero, 0, -128, 127)
    codes = quantize(x, made.scale, made.zero_point, INT8, CHANNEL)
    got = dequantize(codes, made.scale, made.zero_point, CHANNEL)
    # torch multiplies by 1 / S: at a tie the two may round to neighbouring codes.
    ties = ((x / made.scale).frac().abs() - 0.5).abs() < 1e-3
    assert torch.allclose(got[~ties], expected[~ties], atol=1e-6)


def test_groups_are_channels_of_a_reshaped_matrix() -> None:
    x = torch.randn(6, 64)
    grouped, channel = Granularity("group", 16), Granularity("channel")
    parts = x.reshape(24, 16)
    made = choose_qparams(parts.amin(1), parts.amax(1), INT4, symmetric=False)
    assert made.zero_point is not None
    by_group = quantize(x, made.scale.view(6, 4), made.zero_point.view(6, 4), INT4, grouped)
    by_row = quantize(parts, made.scale[:, None], made.zero_point[:, None], INT4, channel)
    assert torch.equal(by_group, by_row.view(6, 64))


def test_a_float16_scale_below_its_normal_range_keeps_the_bound() -> None:
    low, high = ranges(-1e-6, 1e-6)
    made = choose_qparams(low, high, INT8, symmetric=True, scale_dtype=torch.float16)
    codes = quantize(high, made.scale, None, INT8, TENSOR)
    error = (dequantize(codes, made.scale, None, TENSOR) - high).abs().item()
    assert error <= made.scale.float().item() / 2
