"""QuantLinear behaves as users expect of a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ptq.algorithms import round_to_nearest
from ptq.config import preset
from ptq.kernels import Reference
from ptq.modules import QuantLinear


def make(
    scheme: str = "w4a16-g32-asym", bias: bool = True, n: int = 48, k: int = 64
) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    made = preset(scheme)
    return QuantLinear(
        round_to_nearest(weight, made.weights),
        made,
        torch.randn(n, generator=generator) if bias else None,
    )


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16-g32", "w4a16-g32-asym", "w3a16-g32"])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_float_linear_of_its_weight(scheme: str, bias: bool) -> None:
    layer = make(scheme, bias)
    x = torch.randn(2, 40, 64)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    # Activations in one digit or two are off by half a step of each token; weight-only kernels
    # round x, the weight and the result to bfloat16 at most.
    steps = x.abs().amax(-1, keepdim=True) / (127 if scheme.endswith("a8") else 32512)
    bound = 0.5 * steps * layer.weight.abs().sum(1) + 1e-4
    if scheme.startswith(("w3", "w4")):
        bound = bound + 1.5 * torch.finfo(torch.bfloat16).eps * (x.abs() @ layer.weight.abs().t())
    assert ((layer(x) - expected).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (2, 3, 4, 64), (0, 64)])
def test_keeps_leading_dimensions(shape: tuple[int, ...]) -> None:
    assert make()(torch.randn(shape)).shape == (*shape[:-1], 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    assert make("w8a8")(torch.randn(3, 64, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_conversion_keeps_codes_and_scales(convert: object) -> None:
    layer = make("w8a16")
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    assert callable(convert)
    after = convert(layer).state_dict()
    for name in ("codes", "scale"):
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert after["bias"].dtype in (torch.bfloat16, torch.float16)


def test_moves_between_devices() -> None:
    layer = make().to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.to_empty(device="cpu").codes.device.type == "cpu"


def test_deep_copy_and_pickle_are_equal_and_independent() -> None:
    layer = make()
    x = torch.randn(3, 64)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not twin._choice  # which kernel, and its form of the weight: this layer's
        assert torch.equal(twin(x), expected)
        twin.codes.zero_()
        assert torch.equal(layer(x), expected)


def test_state_dict_holds_the_canonical_weight_only() -> None:
    layer = make()
    before = set(layer.state_dict())
    for m in (1, 100):
        layer(torch.randn(m, 64))
    assert set(layer.state_dict()) == before == {"codes", "scale", "zero_point", "bias"}


def test_loading_a_state_dict_replaces_what_the_kernels_prepared() -> None:
    layer, other = make(), make()
    x = torch.randn(1, 64)
    layer(x)
    other.scale.mul_(2)
    other.bias.data.zero_()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_a_measured_choice_replaces_the_kept_one() -> None:
    layer = make()
    x = torch.randn(2, 64)
    layer(x)
    exact = nn.functional.linear(x, layer.weight, layer.bias)
    layer.tune("cpu", torch.float32, ((1, Reference()),))
    torch.testing.assert_close(layer(x), exact, rtol=1e-6, atol=1e-5)
    assert layer._choice["cpu", torch.float32, 2][0] == Reference()


def test_on_meta_has_the_shapes_and_dtypes_of_the_real_one() -> None:
    for scheme in ("w8a16", "w8a8-static", "w4a16-g32", "w4a16-g32-asym", "w3a16-g32-asym"):
        real = make(scheme.removesuffix("-static"))
        empty = QuantLinear.on_meta(64, 48, preset(scheme), torch.float32)
        for name, tensor in real.state_dict().items():
            twin = empty.state_dict()[name]
            assert (twin.shape, twin.dtype) == (tensor.shape, tensor.dtype)
            assert twin.is_meta


def test_switching_dtype_between_calls() -> None:
    layer = make()
    x = torch.randn(1, 64)
    first = layer(x)
    layer(x.bfloat16())
    assert torch.equal(layer(x), first)


def test_works_where_gradients_are_recorded() -> None:
    x = torch.randn(40, 64, requires_grad=True)
    assert not make()(x).requires_grad
