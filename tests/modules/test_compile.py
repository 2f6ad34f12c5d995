"""torch.compile: one graph for a range of rows, no graph breaks, the same results."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter

import ptq
from ptq.algorithms import round_to_nearest
from ptq.config import Scheme, preset
from ptq.core import Rotation
from ptq.modules import QuantLinear


@pytest.mark.parametrize(
    "scheme", ["w8a8", "w8a16", "w4a16-g32", "w4a8-g32", "w3a16-g32-asym", "fp8"]
)
def test_few_graphs_serve_every_number_of_rows(scheme: str) -> None:
    """One row, few rows and many rows: a graph each, and one for the first shape seen."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    ptq.quantize(model, scheme)
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 2, 3, 5, 7, 12, 17, 20, 33, 40, 49, 64, 73, 100):
            x = torch.randn(rows, 64)
            found, expected = compiled(x), model(x)
            if scheme.startswith(("w3", "w4")):  # eager code may multiply these in bfloat16
                assert (found - expected).norm() <= 2**-7 * expected.norm()
            else:
                assert torch.equal(found, expected)
    assert graphs.frame_count <= 4


def rotated(scheme: Scheme) -> QuantLinear:
    """A layer that rotates its input."""
    made = scheme.model_copy(update={"input_rotation": "hadamard"})
    weight = Rotation.of(96).weight(torch.randn(64, 96))
    return QuantLinear(round_to_nearest(weight, scheme.weights), made)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_rotated_layers_compile_before_they_have_run(scheme: str) -> None:
    torch._dynamo.reset()
    layer = rotated(preset(scheme))
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for rows in (7, 33, 40):
            x = torch.randn(rows, 96)
            assert torch.equal(compiled(x), layer(x))
    assert graphs.frame_count <= 4
