"""Layers that read one tensor as one product."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.compilation.common_subexpressions import CommonSubexpressions
from ptq.modules import QuantLinear, join, readers_of_one_tensor
from tests.helpers import tiny_llama, tiny_tokens


class Three(nn.Module):
    """Reads x three times, one of them with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 48), nn.Linear(64, 32, bias=False)
        self.v = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)


def layers_of(model: nn.Module) -> tuple[QuantLinear, ...]:
    return tuple(m for m in model.modules() if isinstance(m, QuantLinear))


def quantized(request: object = "w8a16") -> nn.Module:
    torch.manual_seed(0)
    model = Three().bfloat16()
    ptq.quantize(model, request)
    return model


def test_readers_of_one_tensor_are_found_in_a_run() -> None:
    model = tiny_llama()
    ptq.quantize(model, "w8a16")
    names = {module: name for name, module in model.named_modules()}
    groups = readers_of_one_tensor(model, lambda: model(input_ids=tiny_tokens(1, 3)))
    found = {tuple(names[layer].split(".", 3)[-1] for layer in group) for group in groups}
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert found == {attention, ("mlp.gate_proj", "mlp.up_proj")}
    assert len(groups) == 2 * model.config.num_hidden_layers


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*")  # of the compiler's imports
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16-g32"])
def test_a_joint_product_gives_each_layer_its_columns(scheme: str) -> None:
    torch._dynamo.reset()
    model = quantized(scheme)
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        expected = model(x)
        assert join(layers_of(model), 1, torch.bfloat16)
        compiled = torch.compile(
            model, options={"post_grad_custom_pre_pass": CommonSubexpressions()}
        )
        found = compiled(x)
        assert torch.equal(model(x), expected)  # eager code is as before
        other = torch.randn(5, 64).bfloat16()  # another number of rows: each layer for itself
        assert (compiled(other) - model(other)).norm() <= 2**-7 * model(other).norm()
    assert (found - expected).norm() <= 2**-7 * expected.norm()


def test_three_products_become_one() -> None:
    """The graph that the compiler sees after the pass."""
    graph = torch.fx.Graph()
    x, w, other = (graph.placeholder(name) for name in "xwo")
    mm = torch.ops.aten.mm.default
    first, again = graph.call_function(mm, (x, w)), graph.call_function(mm, (x, w))
    different = graph.call_function(mm, (x, other))
    noise = [graph.call_function(torch.ops.aten.rand_like.default, (x,)) for _ in range(2)]
    graph.output((first, again, different, *noise))
    CommonSubexpressions()(graph)
    graph.lint()
    called = [n for n in graph.nodes if n.op == "call_function"]
    assert called == [first, different, *noise]
    module = torch.fx.GraphModule({}, graph)
    a, b, c = torch.randn(3, 3), torch.randn(3, 3), torch.randn(3, 3)
    outputs = module(a, b, c)
    assert torch.equal(outputs[0], a @ b)
    assert torch.equal(outputs[1], a @ b)
    assert torch.equal(outputs[2], a @ c)


def test_numbers_of_another_type_are_other_arguments() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    add = torch.ops.aten.add.Tensor
    nodes = [graph.call_function(add, (x, value)) for value in (1, 1.0, 1)]
    graph.output(tuple(nodes))
    CommonSubexpressions()(graph)
    assert [n for n in graph.nodes if n.op == "call_function"] == nodes[:2]


def test_joined_codes_are_parts_of_one_tensor_and_the_same_checkpoint() -> None:
    model = quantized("w8a16")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = layers_of(model)
    assert join(layers, 1, torch.bfloat16)
    assert len({layer.codes.untyped_storage().data_ptr() for layer in layers}) == 1
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    twin = copy.deepcopy(model)
    assert all(layer.joint is None for layer in layers_of(twin))
    assert all(
        torch.equal(a, b) for a, b in zip(after.values(), twin.state_dict().values(), strict=True)
    )
    model.load_state_dict(before)
    assert all(layer.joint is None for layer in layers)


@pytest.mark.parametrize(
    "request_",
    [
        {"scheme": "w8a16", "rules": [{"layers": "k", "scheme": "w4a16-g32"}]},
        "w8a16-tensor",
    ],
    ids=str,
)
def test_layers_that_quantize_differently_stay_apart(request_: object) -> None:
    model = quantized(request_)
    assert not join(layers_of(model), 1, torch.bfloat16)
    assert all(layer.joint is None for layer in layers_of(model))
