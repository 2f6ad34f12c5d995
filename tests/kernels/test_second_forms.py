"""Kernels that keep a second form of the weight: what it holds, and what it costs in accuracy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.algorithms import round_to_nearest
from ptq.config import Scheme, preset
from ptq.kernels import LinearSpec, quantize_activation
from ptq.kernels.cpu_nibble_groups import UnpackGroups
from ptq.kernels.cpu_onednn import OneDnn, Requantized, onednn_reason
from ptq.kernels.dequantize import compute_dtype, multiplies_bfloat16
from ptq.kernels.nibbles import nibble_rows, nibbles_in_float
from ptq.kernels.resident import Resident

GROUPED = preset("w4a8-g32-asym")


def onednn_or_skip() -> None:
    spec = LinearSpec.of(
        round_to_nearest(torch.randn(16, 32), GROUPED.weights), None, "cpu", torch.float32, 1
    )
    reason = onednn_reason(spec)
    if reason is not None:
        pytest.skip(reason)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))
def test_nibbles_become_their_codes(rows: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, half), dtype=torch.uint8, generator=generator)
    found = nibbles_in_float(packed, nibble_rows(9, 2 * half))
    for row in range(rows):
        for byte in range(half):
            low, high = packed[row, byte].item() % 16, packed[row, byte].item() // 16
            assert found[row, 2 * byte : 2 * byte + 2].tolist() == [low - 8, high - 8]


def test_requantized_weights_are_within_half_an_int8_step_of_their_row() -> None:
    """Read back by multiplying with the identity, which is exact."""
    onednn_or_skip()
    weight = round_to_nearest(torch.randn(48, 64) * torch.rand(48, 1) * 10, GROUPED.weights)
    identity = quantize_activation(torch.eye(64) * 127, GROUPED.activations)
    kernel = Requantized()
    held = kernel.linear(identity, kernel.prepare(weight, torch.float32), torch.float32).t() / 127
    exact = weight.dequantize()
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    assert ((held - exact).abs() <= step * (0.5 + 1e-4)).all()
    assert not torch.equal(held, exact)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8", "w4a8-g32"])
def test_what_a_form_takes_is_what_is_announced(scheme: str) -> None:
    made = preset(scheme)
    weight = round_to_nearest(torch.randn(64, 96), made.weights)
    spec = LinearSpec.of(weight, made.activations, "cpu", torch.bfloat16, 8)
    for kernel in (OneDnn(), Requantized(), UnpackGroups()):
        if kernel.supports(spec) is None:
            form = kernel.prepare(weight, torch.bfloat16)
            tensors = [v for v in vars(form).values() if isinstance(v, torch.Tensor)]
            held = sum(t.numel() * t.dtype.itemsize for t in tensors if t.numel() > 1)
            assert held == kernel.extra_bytes(spec)
            assert "second weight" in str(kernel.declines(spec))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e9])
def test_unpacked_groups_of_any_scale(scale: float) -> None:
    """The op's scales are float16, which holds 6e-8 to 65504."""
    scheme = Scheme.model_validate(
        {"weights": {"format": "int4", "group_size": 32, "scale_dtype": "float32"}}
    )
    weight = round_to_nearest(torch.randn(16, 64) * scale, scheme.weights)
    x = quantize_activation(torch.randn(40, 64), None)
    kernel = UnpackGroups()
    found = kernel.linear(x, kernel.prepare(weight, torch.float32), torch.float32)
    expected = x.values @ weight.dequantize().t()
    # x, the weight and the result in bfloat16, at most 2^-8 each.
    assert (found - expected).norm() <= 3 * 2.0**-8 * expected.norm()


def test_the_float_weight_is_packed_where_onednn_takes_its_dtype() -> None:
    weight = round_to_nearest(torch.randn(48, 64), preset("w4a16-g32").weights)
    kernel = Resident()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = quantize_activation(torch.randn(3, 64).to(dtype), None)
        found = kernel.linear(x, kernel.prepare(weight, dtype), dtype)
        expected = x.values.float() @ weight.dequantize().t()
        assert (found.float() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
    if torch.backends.mkldnn.is_available():
        assert kernel.prepare(weight, torch.float32).is_mkldnn


def test_float32_is_multiplied_in_bfloat16_only_for_few_bits_and_where_it_is_fast() -> None:
    assert compute_dtype("cpu", torch.float16, 4) == torch.float32
    assert compute_dtype("cpu", torch.float32, 8) == torch.float32
    assert compute_dtype("cuda", torch.float32, 4) == torch.float32
    fast = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    assert compute_dtype("cpu", torch.float32, 4) == fast
