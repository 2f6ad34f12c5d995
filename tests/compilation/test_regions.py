"""Blocks that do the same are traced once; blocks that do not are left alone."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import StaticCache

import ptq
from ptq.compilation.likeness import differences, leaves
from ptq.compilation.regions import as_regions, find_regions
from ptq.kv_cache import FixedLayer, cache_settings, held_scales, make_fixed
from tests.helpers import tiny_llama, tiny_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*")


def step(model: Any, length: int = 5) -> dict[str, Any]:
    """The options of a decoding step behind a prompt."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    settings = cache_settings(model)
    if settings is not None:
        make_fixed(cache, model.config, settings, held_scales(model))
    ids = tiny_tokens(1, length + 1)
    with torch.no_grad():
        model(input_ids=ids[:, :length], past_key_values=cache, use_cache=True)
    return {"input_ids": ids[:, length:], "past_key_values": cache, "use_cache": True}


def keys(options: dict[str, Any]) -> list[torch.Tensor]:
    """Of each layer, or their codes."""
    layers = options["past_key_values"].layers
    return [
        (layer.states[0].stored.codes if isinstance(layer, FixedLayer) else layer.keys).clone()
        for layer in layers
    ]


@pytest.mark.parametrize(
    "cache", [None, {"bits": 8}, {"bits": 4, "window": 2, "mode": "static"}], ids=str
)
@torch.no_grad()
def test_a_block_is_traced_once_and_the_cache_is_written(cache: Any) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    ptq.quantize(model, "w8a16")
    ptq.quantize_cache(model, cache, calibration=[tiny_tokens()])
    options, again = step(model), step(model)
    before = keys(options)
    regions = find_regions(model, options)
    assert set(regions) == set(model.model.layers)
    assert all(map(torch.equal, keys(options), before))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    expected = model(**again).logits
    with as_regions(regions):
        found = torch.compile(model.__call__, backend=backend)(**options).logits
    assert torch.equal(found, expected)
    assert all(map(torch.equal, keys(options), keys(again)))
    (graph,) = graphs
    calls = [n for n in graph.graph.nodes if "invoke_subgraph" in str(n.target)]
    assert len(calls) == 2
    assert len({getattr(graph, n.args[0].target) for n in calls}) == 1
    assert all("forward" not in vars(block) for block in regions)


def test_blocks_with_other_schemes_are_groups_of_their_own() -> None:
    model = tiny_llama()
    ptq.quantize(model, {"scheme": "w8a16", "rules": [{"layers": "*.0.mlp.*", "scheme": "w8a8"}]})
    assert find_regions(model, step(model)) == {}


def test_a_block_that_depends_on_its_position_is_left_alone() -> None:
    model = tiny_llama()
    block = type(model.model.layers[0])

    class Scaled(block):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
            return super().forward(hidden_states, **options) / (1 + self.self_attn.layer_idx)

    for layer in model.model.layers:
        layer.__class__ = Scaled
    assert find_regions(model, step(model)) == {}
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_what_is_alike() -> None:
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    a.index, b.index = 4, 5
    assert differences(leaves(a), leaves(b), (4, 5)) == [(b, "index")]
    assert differences(leaves(a), leaves(b), (4, 6)) is None
    assert differences(leaves(a), leaves(nn.Linear(3, 2)), (4, 5)) is None
    a.weight.data, b.index = a.weight.data.double(), 4
    assert differences(leaves(a), leaves(b), (0, 1)) is None
    assert differences(leaves(nn.ReLU()), leaves(nn.ReLU()), (0, 1)) == []
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    a.flag, b.flag = False, True
    assert differences(leaves(a), leaves(b), (0, 1)) is None
    a.flag = b.flag
    a.rule, b.rule = torch.relu, torch.tanh
    assert differences(leaves(a), leaves(b), (0, 1)) is None
