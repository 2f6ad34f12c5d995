"""Every kernel equals the reference on every spec that it claims to support."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ptq.algorithms import round_to_nearest, with_static_input
from ptq.config import ActivationScheme, Scheme
from ptq.core import QuantizedWeight
from ptq.errors import UnsupportedError
from ptq.kernels import (
    KERNELS,
    Activation,
    CudaFloat8,
    CudaInt4,
    CudaIntMM,
    Kernel,
    LinearSpec,
    Reference,
    quantize_activation,
    row_ranges,
    select,
)
from ptq.kernels.cpu_int_mm import int_product
from ptq.kernels.cpu_two_digit import two_digits
from tests.kernels.cuda_stand_in import CudaOps

CPU_KERNELS = [k for k in KERNELS if not k.name.startswith(("cuda", "native", "triton"))]
CUDA_KERNELS = [made(ops=CudaOps()) for made in (CudaIntMM, CudaInt4, CudaFloat8)]
ROWS = (1, 2, 7, 16, 17, 33, 130)
SHAPES = ((48, 128), (33, 256), (17, 48), (5, 40), (64, 24))
WEIGHTS = (
    {},
    {"symmetric": False},
    {"granularity": "tensor"},
    {"group_size": 8},
    {"format": "int4"},
    {"format": "int4", "symmetric": False},
    {"format": "int4", "granularity": "tensor"},
    {"format": "int4", "group_size": 64},
    {"format": "int4", "group_size": 32, "symmetric": False},
    {"format": "int4", "group_size": 16, "symmetric": False, "scale_dtype": "bfloat16"},
    {"format": "int3", "group_size": 64, "symmetric": False},
    {"format": "int2", "group_size": 8},
    {"format": "int5"},
    {"format": "int6", "group_size": 8, "symmetric": False},
    {"format": "float8_e4m3fn"},
    {"format": "float8_e4m3fn", "granularity": "tensor"},
    {"format": "float8_e4m3fn", "group_size": 16, "scale_dtype": "bfloat16"},
)
ACTIVATIONS = (
    None,
    {"mode": "dynamic"},
    {"mode": "dynamic", "symmetric": False},
    {"mode": "static"},
    {"mode": "static", "symmetric": False},
    {"format": "float8_e4m3fn"},
)


def make_scheme(weights: dict, activations: dict | None) -> Scheme | None:
    """None where the weights do not go with the activations."""
    if activations is not None:
        kinds = {"float8" in part.get("format", "int8") for part in (weights, activations)}
        if len(kinds) > 1:
            return None
    return Scheme.model_validate({"weights": weights, "activations": activations})


def make_weight(n: int, k: int, scheme: Scheme) -> QuantizedWeight | None:
    """A quantized random weight, or None where the group size does not divide K."""
    group = scheme.weights.group_size
    if group is not None and k % group:
        return None
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) + 0.3
    quantized = round_to_nearest(weight, scheme.weights)
    if scheme.activations is not None and scheme.activations.mode == "static":
        low, high = torch.tensor([-3.0]), torch.tensor([4.0])
        quantized = with_static_input(quantized, scheme.activations, low, high)
    return quantized


def inputs(m: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Contiguous, strided and transposed x."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, 2 * k, generator=generator).to(dtype)
    return [x[:, :k].contiguous(), x[:, ::2], x[:, :k].t().contiguous().t()]


def check(kernel: Kernel, spec: LinearSpec, weight: QuantizedWeight, x: torch.Tensor) -> None:
    activation = quantize_activation(
        x, spec.activations, weight.input_scale, weight.input_zero_point
    )
    exact = Reference().linear(activation, weight, torch.float32)
    got = kernel.linear(activation, kernel.prepare(weight, spec.dtype), spec.dtype)
    assert got.dtype == spec.dtype
    assert got.shape == exact.shape
    # |x| |W|^T bounds what rounding of single factors can add up to.
    magnitude = activation.dequantize().abs() @ weight.dequantize().abs().t()
    float32 = spec.k * torch.finfo(torch.float32).eps
    bound = (kernel.tolerance(spec) + torch.finfo(spec.dtype).eps + float32) * magnitude
    assert ((got.float() - exact).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kernel", [*CPU_KERNELS, *CUDA_KERNELS], ids=lambda k: k.name)
def test_equals_the_reference_where_it_claims_to(
    kernel: Kernel, activations: dict | None, dtype: torch.dtype
) -> None:
    device = "cuda" if kernel.name.startswith("cuda") else "cpu"
    for weights in WEIGHTS:
        scheme = make_scheme(weights, activations)
        for n, k in SHAPES if scheme is not None else ():
            weight = make_weight(n, k, scheme)
            if weight is None:
                continue
            for m in ROWS:
                spec = LinearSpec.of(weight, scheme.activations, device, dtype, m)
                if kernel.supports(spec) is not None:
                    continue
                for x in inputs(m, k, dtype):
                    check(kernel, spec, weight, x)


def misaligned(x: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """The same values in memory that begins in the middle of an aligned piece."""
    held = torch.empty(x.numel() + elements, dtype=x.dtype)
    return held[elements:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.name)
def test_memory_may_begin_anywhere(kernel: Kernel, dtype: torch.dtype) -> None:
    """As in a file that is mapped; ``_weight_int8pack_mm`` ends the process then."""
    n, k = 48, 128
    for weights in WEIGHTS:
        for activations in ACTIVATIONS:
            scheme = make_scheme(weights, activations)
            weight = None if scheme is None else make_weight(n, k, scheme)
            if scheme is None or weight is None:
                continue
            weight = replace(weight, packed=misaligned(weight.packed))
            for m in (1, 4, 17):
                spec = LinearSpec.of(weight, scheme.activations, "cpu", dtype, m)
                if kernel.supports(spec) is None:
                    check(kernel, spec, weight, misaligned(inputs(m, k, dtype)[0]))


@pytest.mark.parametrize("kernel", [*CPU_KERNELS, *CUDA_KERNELS], ids=lambda k: k.name)
def test_every_kernel_supports_something(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that refuses everything would pass the conformance test idly."""
    monkeypatch.setattr("ptq.kernels.cpu_int_mm.has_vnni", lambda: True)
    device = "cuda" if kernel.name.startswith("cuda") else "cpu"
    found = 0
    for weights in WEIGHTS:
        for activations in ACTIVATIONS:
            scheme = make_scheme(weights, activations)
            weight = None if scheme is None else make_weight(48, 128, scheme)
            if scheme is not None and weight is not None:
                spec = LinearSpec.of(weight, scheme.activations, device, torch.bfloat16, 1)
                found += kernel.supports(spec) is None
    assert found >= 1


def test_int8pack_refuses_columns_that_crash_the_op() -> None:
    """The op reads past the end of a row of bfloat16 when K is not a multiple of 16."""
    scheme = Scheme.model_validate({})
    weight = make_weight(16, 40, scheme)
    assert weight is not None
    spec = LinearSpec.of(weight, None, "cpu", torch.bfloat16, 1)
    int8pack = next(k for k in KERNELS if k.name == "int8pack")
    assert "multiple of 16" in str(int8pack.supports(spec))


def test_int_mm_is_exact_in_the_extreme() -> None:
    """All codes at their extremes: the int32 sum must not round or overflow."""
    scheme = Scheme.model_validate({"activations": {"mode": "static"}})
    k = 4096
    weight = round_to_nearest(torch.full((8, k), -1.0), scheme.weights)
    weight = QuantizedWeight.from_codes(
        torch.full((8, k), -128, dtype=torch.int8),
        torch.ones(8, 1),
        None,
        weight.format,
        weight.granularity,
    )
    x = Activation(torch.full((1, k), -128, dtype=torch.int8), torch.ones(1, 1))
    int_mm = next(kernel for kernel in KERNELS if kernel.name == "int_mm")
    y = int_mm.linear(x, int_mm.prepare(weight, torch.float32), torch.float32)
    assert (y == 128 * 128 * k).all()


@pytest.mark.parametrize("m", [1, 16, 17, 200])
def test_cuda_int_mm_pads_few_rows(m: int) -> None:
    """The op refuses 16 rows or fewer: decode must still run on it."""
    scheme = Scheme.model_validate({"activations": {"mode": "dynamic"}})
    weight = make_weight(16, 32, scheme)
    assert weight is not None
    spec = LinearSpec.of(weight, scheme.activations, "cuda", torch.bfloat16, m)
    kernel = CudaIntMM(ops=CudaOps())
    assert kernel.supports(spec) is None
    check(kernel, spec, weight, torch.randn(m, 32).bfloat16())


def test_the_choice_depends_on_the_rows() -> None:
    scheme = Scheme.model_validate({"weights": {"format": "int4", "group_size": 64}})
    weight = make_weight(64, 128, scheme)
    assert weight is not None
    spec = LinearSpec.of(weight, None, "cpu", torch.bfloat16, 1)
    ranges = row_ranges(spec)
    assert [r.kernel for r in ranges] == ["int4pack", "dequantize"]
    assert ranges[0].first == 1
    assert ranges[1].last is None
    boundary = ranges[1].first
    assert ranges[0].last == boundary - 1
    assert select(spec.with_rows(boundary - 1)).name == "int4pack"
    assert select(spec.with_rows(boundary)).name == "dequantize"
    assert any(name == "int4pack" and "slower" in why for name, why in ranges[1].refused)


def test_int8_activations_take_the_weight_only_kernel_for_two_to_six_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ptq.kernels.cpu_int_mm.has_vnni", lambda: True)
    scheme = Scheme.model_validate({"activations": {"mode": "dynamic"}})
    weight = make_weight(64, 128, scheme)
    assert weight is not None
    spec = LinearSpec.of(weight, scheme.activations, "cpu", torch.bfloat16, 1)
    assert [(r.first, r.last, r.kernel) for r in row_ranges(spec)] == [
        (1, 1, "int_mm"), (2, 6, "int8pack"), (7, None, "int_mm"),
    ]  # fmt: skip


@pytest.mark.parametrize("m", [1, 7, 130, 300])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (4096, 2048)])
def test_int_product_is_exact_whichever_factor_comes_first(m: int, n: int, k: int) -> None:
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    product = int_product(x, w)
    # Sums of at most 2048 * 2^14 = 2^25 are exact in float64.
    assert torch.equal(product.double(), x.double() @ w.double().t())


@given(
    arrays(
        np.float32,
        (3, 16),
        elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False),
    ),
)
def test_two_digits_hold_x_to_half_a_step(values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    digits, scale = two_digits(x)
    high, low = digits[:3].double(), digits[3:].double()
    error = ((256 * high + low) * scale - x).abs()
    # float32 divides and rounds: codes up to 2^15 with 24 bits leave 2^-9 of a step.
    assert (error <= scale.double() * (0.5 + 2.0**-8)).all()
    assert (scale.double() >= x.abs().amax(-1, keepdim=True).double() / 32512 * (1 - 1e-6)).all()


def test_two_digits_at_the_ties_between_digits() -> None:
    """Half of 256 rounds into the high digit: 128 does not fit the low one."""
    codes = torch.arange(-32512, 32513, dtype=torch.float32)
    digits, scale = two_digits(codes[None])
    assert scale.item() == 1
    assert torch.equal(256 * digits[0].float() + digits[1].float(), codes)


def test_no_kernel_lists_every_reason() -> None:
    weight = make_weight(33, 40, Scheme.model_validate({"weights": {"format": "int5"}}))
    assert weight is not None
    spec = LinearSpec.of(weight, None, "cpu", torch.bfloat16, 1)
    with pytest.raises(UnsupportedError) as error:
        select(spec, KERNELS[:3])
    for kernel in KERNELS[:3]:
        assert kernel.name in str(error.value)
    assert "[1, 40] x [33, 40]^T" in str(error.value)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_activations_are_within_half_a_step(symmetric: bool) -> None:
    scheme = ActivationScheme(mode="dynamic", symmetric=symmetric, format="int8")
    x = torch.randn(50, 64) * torch.logspace(-6, 4, 50).unsqueeze(1) + 0.1
    x[3] = 0
    activation = quantize_activation(x, scheme)
    assert activation.scale is not None
    error = (activation.dequantize() - x).abs()
    assert (error <= activation.scale * 0.5 * (1 + 1e-5) + 1e-7 * x.abs()).all()


def test_many_rows_are_quantized_like_each_of_them() -> None:
    """They are quantized some at a time."""
    scheme = ActivationScheme(mode="dynamic", symmetric=True, format="int8")
    x = torch.randn(700, 1024) * torch.logspace(-3, 3, 700).unsqueeze(1)
    activation = quantize_activation(x, scheme)
    assert activation.scale is not None
    assert ((activation.dequantize() - x).abs() <= activation.scale * 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("weights", [{"format": "int4", "group_size": 64}, {"format": "int8"}])
def test_a_weight_of_several_blocks(weights: dict) -> None:
    """Large enough to be dequantized block by block, and nibbles in several pieces of a block."""
    scheme = Scheme.model_validate({"weights": weights})
    weight = make_weight(4700, 512, scheme)
    assert weight is not None
    spec = LinearSpec.of(weight, None, "cpu", torch.float32, 3)
    check(next(k for k in KERNELS if k.name == "dequantize"), spec, weight, torch.randn(3, 512))


def test_static_activations_saturate() -> None:
    scheme = ActivationScheme(mode="static", symmetric=True, format="int8")
    x = torch.tensor([[-10.0, -1.0, 0.0, 0.5, 127 / 128, 10.0]])
    activation = quantize_activation(x, scheme, torch.tensor(1 / 128))
    assert activation.dequantize().tolist() == [[-1.0, -1.0, 0.0, 0.5, 127 / 128, 127 / 128]]


def test_nan_activations_stay_nan() -> None:
    scheme = ActivationScheme(mode="dynamic", symmetric=True, format="int8")
    activation = quantize_activation(torch.tensor([[1.0, float("nan")]]), scheme)
    assert activation.scale is not None
    assert activation.scale.isnan().all()
