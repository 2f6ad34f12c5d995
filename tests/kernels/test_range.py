"""Where number formats end: saturating products, cancelling sums, scales too small or too large."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.config import preset
from ptq.errors import UnsupportedError
from ptq.modules import QuantLinear


def quantized(weight: Tensor, scheme: str | dict[str, object]) -> QuantLinear:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = nn.Parameter(weight)
    ptq.quantize(model, scheme)
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    return layer


def relative_error(layer: QuantLinear, x: Tensor) -> float:
    """Of the outputs, against the layer's own weight in float64; the norm of all outputs."""
    exact = x.double() @ layer.quantized_weight.dequantize(torch.float32).double().t()
    return float((layer(x).double() - exact).norm() / exact.norm())


_SATURATION = """
import torch
from torch import nn
import ptq
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1024, 64, bias=False))
weight = model[0].weight.detach().double()
ptq.quantize(model, "w8a8")
x = torch.randn(40, 1024)
exact = x.double() @ weight.t()
print(float((model(x) - exact).norm() / exact.norm()))
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_int8_products_are_right_on_processors_without_vnni(instructions: str) -> None:
    """oneDNN's int8 product saturates there. A step of 1/127 of the largest of about 1000 normal
    values (3.3) is 0.026, its rounding error 0.026 / sqrt(12) a value; the same again of the
    weights: 1.1% of the output. Saturation gives 12%."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    run = subprocess.run(
        [sys.executable, "-c", _SATURATION],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(run.stdout) < 0.015


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_zero_points_do_not_cancel_the_result_away(dtype: torch.dtype, rows: int) -> None:
    """A large weight in each row puts the zero point far from the codes of the others, so that
    the sum without zero points is a hundred times the result."""
    weight = torch.empty(64, 1024).uniform_(-0.01, 0.01)
    weight[:, 0] = 1
    layer = quantized(weight, "w8a16-asym")
    x = (torch.randn(rows, 1024) + 1).to(dtype)
    x[:, 0] = 0
    # x is exact; rounding the result costs half of eps, products in the dtype of x another.
    assert relative_error(layer, x) < 2 * torch.finfo(dtype).eps + 1e-3


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32", "w4a16-g32-asym", "w4a8-g32", "w8a8"])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1.0, 100.0])
@pytest.mark.parametrize("rows", [1, 40])
def test_float16_activations_with_small_and_large_weights(
    scheme: str, size: float, rows: int
) -> None:
    """The figures do not depend on the size of the weights while the outputs fit float16."""
    scale_dtype = {"scale_dtype": "float32"} if size < 1e-4 else {}
    weight = torch.randn(64, 256) * size
    layer = quantized(weight, _with_scale_dtype(scheme, scale_dtype))
    x = (torch.randn(rows, 256) / max(size, 1e-2)).half()
    # bfloat16 kernels round x and the scales; dynamic activations have steps of 1/127 of 3.
    limit = 0.02 if "a8" in scheme else 0.006
    assert relative_error(layer, x) < limit


def _with_scale_dtype(scheme: str, changes: dict[str, str]) -> dict[str, object]:
    content = preset(scheme).model_dump(mode="json")
    return {"scheme": {**content, "weights": {**content["weights"], **changes}}}


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w4a16-g64-asym", "w8a16-g64"])
def test_small_groups_keep_their_precision_in_float16_scales(scheme: str) -> None:
    """At 1e-5 a scale is at least 2^-24 * 32: rounding it up by one step costs 3%."""
    errors = []
    for size in (1.0, 1e-5):
        weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)) * size
        stored = quantized(weight, scheme).quantized_weight.dequantize(torch.float32)
        errors.append(float((stored - weight).norm() / weight.norm()))
    steps = 0.35 if "w8" in scheme else 0.04  # an int8 scale is 16 times smaller: 2^-24 * 2
    assert errors[1] <= errors[0] * (1 + steps)


def test_a_scale_beyond_its_dtype_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layer 0: .*beyond float16.*scale_dtype: float32"):
        quantized(torch.randn(32, 64) * 1e6, "w4a16-g64")


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w8a8-asym"])
@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (1, 1)])
@pytest.mark.parametrize("rows", [1, 3, 12, 40])
def test_layers_of_one_row_or_column(scheme: str, shape: tuple[int, int], rows: int) -> None:
    layer = quantized(torch.randn(shape) + 2, scheme)
    x = torch.randn(rows, shape[1]).abs() + 1
    # Half a step of the activations, and bfloat16 where the activations are float.
    assert relative_error(layer, x) < 0.5 / 127 + 2 * torch.finfo(torch.bfloat16).eps
