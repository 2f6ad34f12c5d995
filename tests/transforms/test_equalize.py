"""Equalization: the paper's property, the paper's gain, and no loss where it does not help."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ptq.config import Scheme, as_config, preset
from ptq.errors import ConfigError
from ptq.recipe import make_recipe
from ptq.transforms import ScaleGroup
from ptq.transforms.chain import Chain
from ptq.transforms.scaled import ScaledLayer
from ptq.transforms.search import Target
from tests.helpers import quant_linear, quantize_linears
from tests.transforms.models import Called, block_of
from tests.transforms.test_transforms import transform


def mlp(*widths: int, spread: float = 2.0) -> Called:
    """Linear layers with a ReLU between them, whose inner channels are of different sizes that
    cancel; called on random rows."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        parts += [nn.Linear(inputs, outputs), nn.ReLU()]
    block = nn.Sequential(*parts[:-1]).eval().requires_grad_(False)
    for at in range(0, len(block) - 2, 2):
        first, second = block[at], block[at + 2]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        size = (torch.randn(first.out_features) * spread).exp()
        first.weight *= size[:, None]
        first.bias *= size
        second.weight /= size
    return Called(block, (torch.randn(3, 40, widths[0]),), {})


def rule(called: Called, scheme: str) -> dict[str, Scheme]:
    return dict.fromkeys(called.linears(), preset(scheme))


def ranges(called: Called, source: str, target: str) -> tuple[Tensor, Tensor]:
    modules = (called.block.get_submodule(source), called.block.get_submodule(target))
    rows, columns = (m.weight.detach().abs() for m in modules)
    return rows.amax(1), columns.amax(0)


def distance(called: Called, scheme: str) -> float:
    """Of the whole block from the float one, with the modules that users run."""
    made = copy.deepcopy(called)
    quantize_linears(made.block, scheme)
    return float((made.run() - called.run()).norm() / called.run().norm())


def test_two_layers_have_equal_ranges_afterwards() -> None:
    called = mlp(16, 24, 8)
    before, (rows, columns) = called.run(), ranges(called, "0", "2")
    bias = called.block[0].bias.clone()
    (note,) = transform("equalize", called, rule(called, "w8a8-tensor"))
    assert note.startswith("0 -> 2: equalized in 2 sweeps, relative error ")
    expected = (rows * columns).sqrt()  # equation 9 of the paper: r1 = r2 = sqrt(r1 r2)
    for found in ranges(called, "0", "2"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(called.block[0].bias, bias * expected / rows)
    torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=1e-5)


def test_a_chain_is_equalized_until_nothing_moves() -> None:
    called = mlp(16, 24, 20, 12, 8)
    before = called.run()
    notes = transform("equalize", called, rule(called, "w8a8-tensor"))
    assert [note.split(":")[0] for note in notes] == ["0 -> 2", "2 -> 4", "4 -> 6"]
    for source, target in (("0", "2"), ("2", "4"), ("4", "6")):
        rows, columns = ranges(called, source, target)
        torch.testing.assert_close(rows, columns, rtol=2e-3, atol=0)
    torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=1e-5)


def test_iterations_are_a_limit() -> None:
    called = mlp(16, 24, 20, 12, 8)
    notes = transform("equalize", called, rule(called, "w8a8-tensor"), {"iterations": 1})
    assert all("equalized in 1 sweeps" in note for note in notes)
    rows, columns = ranges(called, "0", "2")
    assert not torch.allclose(rows, columns, rtol=0.01)


@pytest.mark.parametrize("widths", [(16, 24, 8), (16, 24, 20, 12, 8)], ids=str)
@pytest.mark.parametrize(
    ("scheme", "gain"),
    [("w8a16-tensor", 10), ("w8a8-tensor", 10), ("w4a16-tensor", 2), ("w8a8", 2), ("w4a16", 2)],
)
def test_a_badly_scaled_model_comes_much_nearer(
    widths: tuple[int, ...], scheme: str, gain: float
) -> None:
    """With one scale for a weight both layers suffer; with one a row, the reader and its input."""
    called = mlp(*widths)
    before = distance(called, scheme)
    transform("equalize", called, rule(called, scheme))
    assert distance(called, scheme) < before / gain


def test_where_it_does_harm_nothing_changes() -> None:
    """Channels of equal size, but for some it is their bias that makes it."""
    called = mlp(16, 24, 8, spread=0.0)
    called.block[0].weight[::2] *= 1e-4
    called.block[0].bias[::2] = 1.0
    weights = copy.deepcopy(called.block.state_dict())
    (note,) = transform("equalize", called, rule(called, "w8a8"))
    assert "no scaling is best" in note
    assert all(torch.equal(w, weights[n]) for n, w in called.block.state_dict().items())


def test_channels_without_a_range_keep_their_scale() -> None:
    called = mlp(16, 24, 8)
    called.block[0].weight[3] = 0.0
    called.block[2].weight[:, 5] = 0.0
    row, column = called.block[0].weight[5].clone(), called.block[2].weight[:, 3].clone()
    (note,) = transform("equalize", called, rule(called, "w8a8-tensor"))
    assert "equalized" in note
    assert torch.equal(called.block[0].weight[5], row)
    assert torch.equal(called.block[2].weight[:, 3], column)


def test_values_of_grouped_heads() -> None:
    """A channel of a value head has the range of the two columns that read it."""
    called = block_of("llama")
    v, o = "self_attn.v_proj", "self_attn.o_proj"
    size = torch.randn(16).exp().square()
    seen = size.reshape(2, 1, 8).expand(2, 2, 8).reshape(32)  # two heads of values, each read twice
    with torch.no_grad():
        called.block.get_submodule(v).weight.mul_(size[:, None])
        called.block.get_submodule(o).weight.div_(seen)
    before = called.run()
    notes = transform("equalize", called, dict.fromkeys((v, o), preset("w8a8-tensor")))
    assert [note.split(",")[0].split(": ")[1] for note in notes if note.startswith(v)] == [
        "equalized in 2 sweeps"
    ]
    rows, columns = ranges(called, v, o)
    read = columns.reshape(2, 2, 8).amax(1).reshape(16)
    torch.testing.assert_close(rows, read, rtol=1e-5, atol=0)
    torch.testing.assert_close(called.run(), before, rtol=1e-4, atol=2e-5)


def test_options() -> None:
    asked = as_config(
        {"scheme": "w8a8", "recipe": [{"name": "equalize", "options": {"iteration": 9}}]}
    )
    with pytest.raises(ConfigError, match="unknown option 'iteration'; did you mean 'iterations'"):
        make_recipe(asked.recipe, asked.scheme)


def test_an_error_counts_by_the_columns_that_read_it() -> None:
    """The error of the source, as its reader passes it on where nothing lies between."""
    called = mlp(16, 24, 8)
    first, second = called.block[0], called.block[2]
    chain = Chain(called.block, [ScaleGroup("0", ("2",), "linear")])
    out, into = torch.rand(24) + 0.5, torch.rand(16) + 0.5
    x, scheme = torch.randn(50, 16), preset("w4a8")
    scaled = nn.Linear(16, 24, bias=False)
    scaled.weight.data = first.weight * into / out[:, None]
    with torch.no_grad():
        given = quant_linear(scaled, scheme)(x / into) * out
    exact = x @ first.weight.T
    reads = second.weight.double().square().sum(0)
    expected = ((given - exact).double().square() @ reads).sum() / (
        exact.double().square() @ reads
    ).sum()
    layer = ScaledLayer(Target(first.weight, x, scheme), chain.readers("0"))
    assert layer.error(out, into) == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(chain.readers("2"), torch.ones(8))
