"""ptq.explain says what really happens."""

import json

import pytest
import torch
from torch import nn

import ptq
from ptq.errors import UnsupportedError
from ptq.kernels import KERNELS, LinearSpec, select
from ptq.modules import QuantLinear
from ptq.report import explain


def model(scheme: str = "w8a16", dtype: torch.dtype = torch.float32) -> nn.Module:
    made = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(64, 32)).to(dtype)
    ptq.quantize(made, scheme)
    return made


def kernel_used(layer: QuantLinear, rows: int, dtype: torch.dtype) -> str:
    """Found by calling the layer and looking at what it bound."""
    layer.release()
    layer(torch.randn(rows, layer.in_features, dtype=dtype))
    (name, _), *others = layer._prepared
    assert not others
    return name


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16-g32", "w4a8-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_that_is_named_is_the_one_that_runs(scheme: str, dtype: torch.dtype) -> None:
    made = model(scheme, dtype)
    groups = explain(made, dtype=dtype).layers
    assert {name for group in groups for name in group.names} == {"0", "1", "2"}
    for group in groups:
        layer = made.get_submodule(group.names[0])
        assert isinstance(layer, QuantLinear)
        assert group.shape == (layer.out_features, layer.in_features)
        assert group.ranges[0].first == 1
        assert group.ranges[-1].last is None
        for at, rows in enumerate(group.ranges):
            last = rows.first if rows.last is None else rows.last
            for m in {rows.first, last}:
                assert kernel_used(layer, m, dtype) == rows.kernel
            if rows.last is not None:
                assert group.ranges[at + 1].first == rows.last + 1


def test_equal_layers_share_a_group_and_the_reasons_are_told() -> None:
    found = explain(model(dtype=torch.bfloat16))
    assert [group.names for group in found.layers] == [("0", "2"), ("1",)]
    shown = str(found)
    assert "32x64 w8a16, 2 layers such as 0" in shown
    assert "not int8pack: more than 24 rows" in shown
    assert "not int_mm: activations are float" in shown
    assert "CUDA" not in shown  # kernels of another device explain nothing
    assert "32x64" in found._repr_html_()
    kernels = json.loads(json.dumps(found.to_dict()))["layers"][0]["kernels"]
    assert [k["kernel"] for k in kernels] == ["int8pack", "dequantize"]
    assert kernels[0]["last_row"] + 1 == kernels[1]["first_row"]


def test_extra_bytes_are_those_the_layers_hold() -> None:
    """What explain announces against the tensors that calls of every size left behind."""
    for scheme in ("w8a16", "w4a16-g32", "w4a8-g32", "w8a8"):
        made = model(scheme, torch.bfloat16)
        announced = sum(g.extra_bytes for g in explain(made).layers)
        held = 0
        for layer in (m for m in made.modules() if isinstance(m, QuantLinear)):
            for rows in (1, 8, 64, 600):
                layer(torch.randn(rows, layer.in_features, dtype=torch.bfloat16))
            own = {b.data_ptr() for b in layer.buffers()}
            tensors = [t for p in layer._prepared.values() for t in tensors_of(p)]
            held += sum(t.nbytes for t in tensors if t.data_ptr() not in own)
        assert held <= announced <= 1.25 * held + 1024, scheme


def tensors_of(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_every_refusal_is_the_kernels_own() -> None:
    spec = LinearSpec.of(
        model()[0].quantized_weight,
        None,
        "cpu",
        torch.bfloat16,
        40,  # type: ignore[index,union-attr]
    )
    chosen = select(spec)
    for kernel in KERNELS[: KERNELS.index(chosen)]:
        assert kernel.supports(spec) or kernel.declines(spec)


def test_a_float_model_has_nothing_to_explain() -> None:
    with pytest.raises(UnsupportedError, match=r"ptq\.quantize"):
        explain(nn.Sequential(nn.Linear(4, 4)))
