"""float8 weights and activations, from the plan to the loaded checkpoint, and the CUDA kernel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

import ptq
from ptq.algorithms import round_to_nearest
from ptq.checkpoint.packed_int32 import write
from ptq.checkpoint.packed_int32.settings import LayoutName
from ptq.config import Scheme, preset
from ptq.core import QuantizedWeight, pack, unpack
from ptq.errors import ConfigError, UnsupportedError
from ptq.formats import FLOAT8
from ptq.kernels import CudaFloat8, LinearSpec, quantize_activation, select
from ptq.modules import QuantLinear, quantized_layers
from tests.helpers import tiny_llama, tiny_tokens
from tests.kernels.cuda_stand_in import CudaOps


def every_code() -> Tensor:
    """All finite values of E4M3 by its definition: bias 7, no infinity, one NaN."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue
            leading = 1 if exponent else 0
            found.append(2.0 ** (max(exponent, 1) - 7) * (leading + mantissa / 8))
    values = torch.tensor(found, dtype=torch.float64)
    return torch.cat((-values, values))


CODES = every_code()
numbers = st.floats(-1000, 1000, width=32)


def distance(values: Tensor) -> Tensor:
    """To the nearest code, in float64."""
    return (values.double().unsqueeze(-1) - CODES).abs().amin(-1)


def test_the_largest_code() -> None:
    assert CODES.max().item() == FLOAT8.qmax == -FLOAT8.qmin


@given(arrays(np.float32, (3, 17), elements=numbers))
def test_codes_are_the_nearest_ones(values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    found = FLOAT8.nearest(x.clone())
    assert torch.equal((found.double() - x.double()).abs(), distance(x))
    assert torch.equal(unpack(pack(found.to(FLOAT8.dtype), FLOAT8), 17, FLOAT8).float(), found)


@given(arrays(np.float32, (4, 16), elements=numbers))
def test_a_weight_is_within_half_a_unit_of_its_codes(values: np.ndarray) -> None:
    w = torch.from_numpy(values)
    made = round_to_nearest(w, preset("fp8").weights)
    assert made.packed.dtype == torch.int8 and made.zero_point is None
    # Three bits of mantissa; below the smallest normal code, 2^-6, half of its last place.
    bound = torch.maximum(w.double().abs() / 16, made.scale.double() * 2.0**-10)
    assert ((made.dequantize().double() - w.double()).abs() <= bound * (1 + 1e-5)).all()
    usual = w.abs().amax(1) > 1e-30  # beyond the smallest scale
    assert (made.codes.float().abs().amax(1)[usual] >= 416).all()  # the range is used


@given(arrays(np.float32, (4, 16), elements=numbers))
def test_activations_have_a_scale_for_each_token(values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    made = quantize_activation(x, preset("fp8").activations)
    assert made.scale is not None and made.scale.shape == (4, 1)
    assert made.values.dtype == torch.float8_e4m3fn and made.zero_point is None
    scaled = x.double() / made.scale.double()
    error = (made.values.double() - scaled).abs()
    assert (error <= distance(scaled) + 448 * 2.0**-22).all()
    wide = quantize_activation(x, preset("fp8").activations, dtype=torch.bfloat16)
    assert torch.equal(wide.values.float(), made.values.float())


@pytest.mark.parametrize("scheme", ["fp8", "fp8-a16"])
def test_from_the_plan_to_the_loaded_checkpoint(tmp_path: Path, scheme: str) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    expected = model(tiny_tokens()).logits.detach()
    plan = ptq.plan(model, scheme)
    assert scheme in str(plan)
    ptq.quantize(model, scheme)
    layer = model.model.layers[0].mlp.up_proj
    assert str(layer.scheme) == scheme
    codes = (weight.float() / layer.scale).to(torch.float8_e4m3fn)
    assert torch.equal(layer.codes.view(torch.float8_e4m3fn).float(), codes.float())
    made = model(tiny_tokens()).logits
    assert (made - expected).norm() / expected.norm() < 0.25
    stored = sum(t.nbytes for m in quantized_layers(model).values() for t in m.buffers())
    assert stored == sum(p.bytes_after for p in plan.quantized)
    ptq.save(model, tmp_path / "out")
    loaded = ptq.load(tmp_path / "out")
    assert torch.equal(loaded(tiny_tokens()).logits, made)
    assert f"{scheme}, " in str(ptq.explain(loaded))
    loaded.to(torch.float32)  # casts no codes
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.codes, layer.codes)


def test_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama(dtype=torch.bfloat16)
    ptq.quantize(model, "fp8")
    ptq.save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tiny_tokens()).logits, model(tiny_tokens()).logits)


def test_embeddings() -> None:
    model = tiny_llama(tied=True)
    weight = model.model.embed_tokens.weight.detach().clone()
    ptq.quantize(model, {"scheme": "fp8", "embeddings": "fp8-a16"})
    rows = model.model.embed_tokens(tiny_tokens())
    bound = weight[tiny_tokens()].abs() / 16 + weight.abs().max() / 448 * 2.0**-10
    assert ((rows - weight[tiny_tokens()]).abs() <= bound).all()


@pytest.mark.parametrize("recipe", ["auto", "gptq", ["rtn", "learned_rounding"]])
def test_recipes_that_move_codes_round_to_nearest(
    tmp_path: Path, tiny_texts: tuple[Path, Path], tiny_model: Path, recipe: object
) -> None:
    from ptq.pipeline import run

    def quantized(name: str, recipe: object) -> nn.Module:
        config = {"model": str(tiny_model), "scheme": "fp8", "recipe": recipe,
                  "output": str(tmp_path / name),
                  "calibration": {"data": str(tiny_texts[0]), "samples": 4,
                                  "sequence_length": 32}}  # fmt: skip
        report = run(ptq.config.as_config(config))
        notes = report.to_json()
        if name == "out" and recipe != "auto":
            assert "rounded to nearest" in notes or "no layer has integer codes" in notes
        return ptq.load(tmp_path / name)

    plain, made = quantized("plain", "rtn"), quantized("out", recipe)
    for name, layer in quantized_layers(plain).items():
        assert torch.equal(layer.codes, quantized_layers(made)[name].codes)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ({"weights": {"format": "float8_e4m3fn", "symmetric": False}}, "is symmetric"),
        ({"weights": {"format": "float8_e4m3fn", "signed_scale": True}}, "is symmetric"),
        ({"weights": {"format": "float8_e4m3fn"}, "activations": {}}, "do not go with int8"),
        ({"weights": {}, "activations": {"format": "float8_e4m3fn"}}, "do not go with float8"),
        (
            {"weights": {"format": "float8_e4m3fn"},
             "activations": {"format": "float8_e4m3fn", "mode": "static"}},
            "are dynamic",
        ),
        ("fp9", "did you mean 'fp8'?"),
    ],
)  # fmt: skip
def test_mistakes(scheme: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        ptq.quantize(nn.Sequential(nn.Linear(16, 16)), scheme)


@pytest.mark.parametrize("layout", ["gptq", "gptq-v2", "awq"])
def test_formats_without_float8_refuse_it(tmp_path: Path, layout: LayoutName) -> None:
    model = tiny_llama()
    ptq.quantize(model, "fp8-a16")
    with pytest.raises(UnsupportedError, match="float8_e4m3fn weights.*--format compressed-tens"):
        write(model, tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_hqq_refuses_it() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ConfigError, match="hqq is for integer codes, not for scheme fp8"):
        ptq.quantize(model, {"scheme": "fp8", "recipe": "hqq"})
    rule = {"layers": "1", "scheme": "fp8"}
    with pytest.raises(UnsupportedError, match="layer 1: float8_e4m3fn codes are not for hqq"):
        ptq.quantize(model, {"scheme": "w8a8", "rules": [rule], "recipe": "hqq"})


def spec(m: int = 1, n: int = 32, k: int = 64, **changes: object) -> LinearSpec:
    scheme = preset("fp8")
    weight = round_to_nearest(torch.randn(n, k), scheme.weights)
    made = LinearSpec.of(weight, scheme.activations, "cuda", torch.bfloat16, m)
    return LinearSpec(**{**vars(made), **changes})


def test_what_the_cuda_kernel_refuses() -> None:
    kernel = CudaFloat8(ops=CudaOps((8, 9)))
    assert kernel.supports(spec()) is None
    assert "8.6: float8 needs 8.9" in str(CudaFloat8(ops=CudaOps((8, 6))).supports(spec()))
    assert "multiples of 16" in str(kernel.supports(spec(k=72)))
    assert "multiples of 16" in str(kernel.supports(spec(n=24)))
    assert "gives bfloat16" in str(kernel.supports(spec(dtype=torch.float16)))
    assert "float8 activations" in str(kernel.supports(spec(activations=None)))
    assert "for CUDA" in str(kernel.supports(spec(device="cpu")))
    int8 = Scheme.model_validate({"activations": {}})
    weight = round_to_nearest(torch.randn(32, 64), int8.weights)
    other = LinearSpec.of(weight, int8.activations, "cuda", torch.bfloat16, 1)
    assert "float8 weights" in str(kernel.supports(other))


@pytest.mark.parametrize("ops", [CudaOps(), torch], ids=["contract", "the op itself, on the CPU"])
@pytest.mark.parametrize("m", [1, 5, 16, 200])
def test_a_layer_by_the_cuda_kernel(m: int, ops: object) -> None:
    """The whole layer hands the op float8 codes, as its contract wants them."""
    scheme = preset("fp8")
    weight = round_to_nearest(torch.randn(32, 64), scheme.weights)
    layer = QuantLinear(weight, scheme, torch.randn(32).bfloat16())
    x = torch.randn(m, 64).bfloat16()
    kernel = CudaFloat8(ops=ops)
    found = layer.run(x, kernel)
    scale = x.float().abs().amax(1, keepdim=True) / 448
    near = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    exact = near @ weight.dequantize().T + layer.bias
    assert (found.float() - exact).norm() <= 2.0**-7 * exact.norm()
    assert layer.prepared(kernel, torch.bfloat16)[0].data_ptr() == layer.codes.data_ptr()


def test_no_integer_kernel_takes_it() -> None:
    for device in ("cpu", "cuda"):
        chosen = select(spec(device=device, dtype=torch.float32))
        assert chosen.name == "dequantize", device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_explaining_a_device_that_is_not_here() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    ptq.quantize(model, "fp8")
    said = str(ptq.explain(model, device="cuda"))
    assert "cuda_fp8: there is no GPU here" in said


def test_a_weight_with_a_zero_point_is_refused() -> None:
    made = round_to_nearest(torch.randn(4, 16), preset("fp8").weights)
    with pytest.raises(ValueError, match="no zero point"):
        QuantizedWeight(**{**vars(made), "zero_point": torch.zeros(4, 1, dtype=torch.int8)})
