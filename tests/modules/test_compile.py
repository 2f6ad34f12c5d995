"""torch.compile: one graph for a range of rows, no graph breaks, the same results."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter

import ptq


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g32", "w4a8-g32", "w3a16-g32-asym"])
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
            assert torch.equal(compiled(x), model(x))
    assert graphs.frame_count <= 4
