"""Triton's programs on a machine without a GPU: interpreted, on tensors in the CPU's memory.

The interpreter multiplies no bfloat16 matrices, so those products are tested in float16.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ptq.algorithms import round_to_nearest
from ptq.kernels import LinearSpec, TritonFloat, TritonInt8, quantize_activation, select
from ptq.kernels.activations import symmetric_codes
from ptq.kernels.cuda_triton import unreadable
from ptq.kernels.dequantize import DequantizeBlocks, _one_pass
from ptq.kernels.triton_launch import quantize_rows
from ptq.kernels.triton_ready import _reason
from tests.kernels.test_conformance import (
    ACTIVATIONS,
    WEIGHTS,
    check,
    inputs,
    make_scheme,
    make_weight,
)

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("scripts/check_cuda.py does this on a GPU", allow_module_level=True)

SHAPES = ((5, 40), (20, 1088))
ROWS = (1, 17)


@pytest.fixture(autouse=True)
def _triton_is_ready(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("ptq.kernels.cuda_triton.triton_reason", lambda: None)
    yield


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_equals_the_reference_where_it_claims_to(weights: dict, activations: dict | None) -> None:
    scheme = make_scheme(weights, activations)
    for n, k in SHAPES if scheme is not None else ():
        weight = make_weight(n, k, scheme)
        if weight is None:
            continue
        for kernel in (TritonInt8(), TritonFloat()):
            for m in ROWS:
                dtype = torch.bfloat16 if m == 1 or kernel.integer else torch.float16
                spec = LinearSpec.of(weight, scheme.activations, "cuda", torch.bfloat16, m)
                if kernel.supports(spec) is not None:
                    continue
                check(kernel, LinearSpec.of(weight, scheme.activations, "cuda", dtype, m), weight,
                      inputs(m, k, dtype)[1])  # fmt: skip


@pytest.mark.parametrize("m", [64, 130])
@pytest.mark.parametrize("n", [64, 1664])
def test_every_tile(n: int, m: int) -> None:
    for weights in ({"symmetric": False}, {"format": "int4", "group_size": 8}):
        weight = make_weight(n, 136, make_scheme(weights, None))
        x = torch.randn(m, 136).half()
        check(TritonFloat(), LinearSpec.of(weight, None, "cuda", torch.float16, m), weight, x)


@pytest.mark.parametrize("m", [64, 130])
@pytest.mark.parametrize("n", [64, 1664])
def test_every_tile_of_the_integer_kernel(n: int, m: int) -> None:
    scheme = make_scheme({"symmetric": False}, {"mode": "dynamic", "symmetric": False})
    weight = make_weight(n, 136, scheme)
    spec = LinearSpec.of(weight, scheme.activations, "cuda", torch.float32, m * 8)
    check(TritonInt8(), spec, weight, torch.randn(m * 8 if n > 64 else m, 136))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantizes_the_rows_asked_for(weights: dict, dtype: torch.dtype) -> None:
    scheme = make_scheme(weights, None)
    if scheme.weights.format not in ("int8", "int4"):
        return
    weight = make_weight(21, 600 if scheme.weights.group_size is None else 640, scheme)
    assert unreadable(weight.format, weight.shape[1]) is None
    block = torch.empty(7, weight.shape[1], dtype=dtype)
    _one_pass(weight)(slice(11, 18), block)
    assert torch.equal(block, weight.dequantize()[11:18].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [5, 2048, 3001])
def test_quantizes_to_the_bits_of_torchs_ops(dtype: torch.dtype, k: int) -> None:
    x = torch.randn(6, k).to(dtype)
    x[0] = 0
    x[1, 3] = 1e4
    x[2, :3] = torch.tensor([127.0, 2.5, 3.5])  # ties
    x[2, 3:] = 0
    codes, scale = symmetric_codes(x, 127)
    got, step = quantize_rows(x, torch.int8)
    assert torch.equal(step, scale)
    assert torch.equal(got, codes.to(torch.int8))
    wide, _ = quantize_rows(x, torch.float32)
    assert torch.equal(wide, codes)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, for NaN to int8
def test_a_row_with_nan_stays_nan() -> None:
    x = torch.randn(2, 50)
    x[1, 7] = torch.nan
    _, scale = quantize_rows(x, torch.int8)
    assert scale.isnan().flatten().tolist() == [False, True]


@pytest.mark.parametrize(
    ("scheme", "m", "name"),
    [
        ({"format": "int8"}, 1, "triton_float"),
        ({"format": "int4", "group_size": 64}, 128, "triton_float"),
        ({"format": "int4", "group_size": 64}, 129, "dequantize"),
        ({"format": "int3", "group_size": 64}, 1, "cuda_int4pack"),
    ],
)
def test_the_rule_of_thumb(scheme: dict, m: int, name: str) -> None:
    weight = round_to_nearest(torch.randn(64, 128), make_scheme(scheme, None).weights)
    assert select(LinearSpec.of(weight, None, "cuda", torch.bfloat16, m)).name == name


@pytest.mark.parametrize("activations", [None, {"mode": "dynamic", "symmetric": False}], ids=str)
@pytest.mark.parametrize("m", [1, 3])
def test_compiled_graphs_call_the_same_as_ops(m: int, activations: dict | None) -> None:
    scheme = make_scheme({"symmetric": False}, activations)
    weight = make_weight(12, 24, scheme)
    kernel = TritonFloat() if activations is None else TritonInt8()
    prepared = kernel.prepare(weight, torch.float16)
    x = quantize_activation(torch.randn(m, 24).half(), scheme.activations)

    def product(values: torch.Tensor) -> torch.Tensor:
        return kernel.linear(replace(x, values=values), prepared, torch.float16)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.values), product(x.values))


def test_rows_of_an_odd_number_of_nibbles_are_for_torchs_ops() -> None:
    scheme = make_scheme({"format": "int4"}, None)
    weight = make_weight(8, 33, scheme)
    assert unreadable(weight.format, 33) == "K=33 must be even for packed codes"
    spec = LinearSpec.of(weight, None, "cuda", torch.bfloat16, 1)
    assert isinstance(select(spec), DequantizeBlocks)


def test_a_launch_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr("torch.cuda.get_device_capability", found.__getitem__)
    assert _reason.__wrapped__() == "compute capability 7.5: Triton's programs need 8.0"
    found[1] = (8, 0)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("torch.ones", fail)
    assert _reason.__wrapped__() == "Triton cannot launch: Failed to find C compiler"


def test_without_a_gpu_they_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight = round_to_nearest(torch.randn(64, 128), make_scheme({}, None).weights)
    spec = LinearSpec.of(weight, None, "cuda", torch.bfloat16, 1)
    assert TritonFloat().supports(spec) == "there is no GPU here"
    assert TritonInt8().supports(spec) is not None
    assert quantize_activation(torch.randn(2, 8), None).scale is None
