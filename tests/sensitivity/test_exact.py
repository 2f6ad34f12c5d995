"""The exact sensitivity against the plain way: quantize a copy of the model, run all of it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from ptq.algorithms import round_to_nearest
from ptq.calibrate import LayerStatistics, collect
from ptq.config import ActivationScheme, Plugin, Scheme, preset
from ptq.core import Rotation
from ptq.errors import CalibrationError, ConfigError
from ptq.kernels import Reference
from ptq.modules import QuantLinear
from ptq.pipeline import quantize
from ptq.sensitivity import Change, InPlace, divergence, exact_divergence
from ptq.swap import place, quantize_layers
from tests.helpers import tiny_bert, tiny_llama, tiny_tokens

LAYERS = (
    "model.layers.0.self_attn.o_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
)


def data() -> list[dict[str, Tensor]]:
    """Two batches; the second has padding."""
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 1, 0, 0]])
    return [
        {"input_ids": tiny_tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.int64)},
        {"input_ids": tiny_tokens() + 1, "attention_mask": mask},
    ]


def by_hand(model: nn.Module, quantized: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean KL over the tokens with a next one, token by token in float64."""
    found = []
    for batch in batches:
        p, q = (m(**batch).logits.double().softmax(-1) for m in (model, quantized))
        for row, mask in enumerate(batch["attention_mask"].tolist()):
            for t in range(sum(mask) - 1):
                found.append(
                    torch.nn.functional.kl_div(q[row, t].log(), p[row, t], reduction="sum")
                )
    return torch.stack(found).mean().item()


def alone(
    model: nn.Module, name: str, scheme: Scheme, seen: dict[str, LayerStatistics] | None = None
) -> nn.Module:
    """A copy in which a layer is a QuantLinear, with exact products."""
    made = copy.deepcopy(model)
    quantize_layers(made, {name: scheme}, seen or {}, round_to_nearest)
    exact_products(made.get_submodule(name))
    return made


def exact_products(layer: nn.Module) -> None:
    assert isinstance(layer, QuantLinear)
    layer.tune("cpu", torch.float32, ((1, Reference()),))


@pytest.mark.parametrize("scheme", ["w4a16-g16-asym", "w8a8", "w4a8-static"])
@torch.no_grad()
def test_equals_a_model_in_which_one_layer_is_quantized(scheme: str) -> None:
    model = tiny_llama()
    wanted = preset(scheme)
    seen = collect(model, dict.fromkeys(LAYERS, ActivationScheme()), data(), Plugin(name="minmax"))
    part = "weights" if wanted.activations is None else "both"
    found = exact_divergence(
        model, data(), dict.fromkeys(LAYERS, wanted), parts=(part,), statistics=seen
    )
    assert [f.layer for f in found] == list(LAYERS)
    for one in found:
        expected = by_hand(model, alone(model, one.layer, wanted, seen), data())
        assert one.kl == pytest.approx(expected, rel=2e-3), one.layer
        assert one.measure == "kl_nats"


@torch.no_grad()
def test_the_parts() -> None:
    """Activations alone is a float product of rounded inputs; weights alone has float inputs."""
    model = tiny_llama()
    name, scheme = LAYERS[1], preset("w3a8")
    found = {f.part: f.kl for f in exact_divergence(model, data(), {name: scheme})}
    assert list(found) == ["weights", "activations", "both"]
    weight_only = by_hand(model, alone(model, name, preset("w3a16")), data())
    assert found["weights"] == pytest.approx(weight_only, rel=1e-3)

    rounded = copy.deepcopy(model)
    layer = rounded.get_submodule(name)

    def rounding(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        step = inputs[0].abs().amax(-1, keepdim=True) / 127
        return (inputs[0] / step).round() * step

    layer.register_forward_pre_hook(rounding)
    assert found["activations"] == pytest.approx(by_hand(model, rounded, data()), rel=1e-2)
    assert found["activations"] < found["weights"]
    weight_only = exact_divergence(
        model, data(), {name: preset("w3a16")}, parts=("activations", "both")
    )
    assert [(f.part, f.kl) for f in weight_only] == [("both", pytest.approx(found["weights"]))]


@torch.no_grad()
def test_a_rotated_layer_equals_the_quantized_one() -> None:
    model, name = tiny_llama(), LAYERS[1]
    scheme = preset("w4a8").model_copy(update={"input_rotation": "hadamard"})
    quantized = copy.deepcopy(model)
    linear = quantized.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    rotated = Rotation.of(64).weight(linear.weight)
    place(quantized, name, round_to_nearest(rotated, scheme.weights), scheme)
    exact_products(quantized.get_submodule(name))
    [found] = exact_divergence(model, data(), {name: scheme}, parts=("both",))
    assert found.kl == pytest.approx(by_hand(model, quantized, data()), rel=2e-3)
    [rounded] = exact_divergence(model, data(), {name: scheme}, parts=("activations",))
    assert 0 < rounded.kl < 0.1 * found.kl
    [weights] = exact_divergence(model, data(), {name: scheme}, parts=("weights",))
    assert weights.kl == pytest.approx(found.kl, rel=0.2)


@torch.no_grad()
def test_only_the_blocks_from_the_layer_on_run() -> None:
    model = tiny_llama()
    in_place = InPlace(model, data())
    assert in_place.chain is not None and not in_place.broken
    weight = model.get_submodule(LAYERS[1]).weight * 1.5
    in_place.distance({LAYERS[1]: Change(weight)})
    assert in_place.runs == len(data())  # the last block, once a batch
    in_place.distance({"lm_head": Change(model.lm_head.weight * 2)})
    assert in_place.runs == len(data())
    in_place.distance({LAYERS[0]: Change(model.get_submodule(LAYERS[0]).weight * 2)})
    assert in_place.runs == 3 * len(data())


@torch.no_grad()
def test_several_layers_at_once() -> None:
    model = tiny_llama()
    other = copy.deepcopy(model)
    changes = {}
    for name in LAYERS:
        weight = other.get_submodule(name).weight
        weight.mul_(1.1)
        changes[name] = Change(weight)
    assert InPlace(model, data()).distance(changes) == pytest.approx(
        by_hand(model, other, data()), rel=1e-3
    )
    # Blocks round float32 in another order than the whole model does.
    assert 0 <= InPlace(model, data()).distance({}) < 1e-12


class _Stop(BaseException):
    """As Ctrl-C is: no Exception."""


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_left_as_it_was(interrupted: bool) -> None:
    model = tiny_llama(tied=True).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    identities = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if interrupted and calls > 15:
            raise _Stop

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    layers = dict.fromkeys(LAYERS, preset("w4a8"))
    try:
        exact_divergence(model, data(), layers)
    except _Stop:
        assert interrupted
    handle.remove()
    assert calls > 15
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == identities
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@torch.no_grad()
def test_a_tied_head_is_changed_without_its_embedding() -> None:
    model = tiny_llama(tied=True)
    untied = tiny_llama(tied=False)
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.lm_head.weight.clone()})
    of_tied, of_untied = (
        exact_divergence(m, data(), {"lm_head": preset("w4a16")})[0].kl for m in (model, untied)
    )
    assert of_tied == of_untied > 0


@torch.no_grad()
def test_an_encoder_has_an_output_error() -> None:
    model = tiny_bert()
    name = "encoder.layer.0.output.dense"
    batches = data()
    [found] = exact_divergence(model, batches, {name: preset("w4a16")})
    assert found.measure == "output_error"
    other = alone(model, name, preset("w4a16"))
    error = size = 0.0
    for batch in batches:
        a, b = model(**batch), other(**batch)
        kept = batch["attention_mask"].bool()
        for x, y in (
            (a.last_hidden_state[kept], b.last_hidden_state[kept]),
            (a.pooler_output, b.pooler_output),
        ):
            error += (x - y).square().sum().item()
            size += x.square().sum().item()
    assert found.kl == pytest.approx(error / size, rel=1e-3)


@torch.no_grad()
def test_two_lists_of_blocks_run_whole() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    batches = [{"input_ids": tiny_tokens(), "labels": tiny_tokens()}]
    in_place = InPlace(model, batches)
    assert in_place.chain is None and "2 lists" in in_place.broken
    name = "encoder.block.0.layer.0.SelfAttention.q"
    [found] = exact_divergence(model, batches, {name: preset("w2a16")})
    assert found.measure == "output_error" and found.kl > 0


class _Skip(nn.Module):
    """Its blocks are a chain, but what is between them is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](first)) + first  # type: ignore[no-any-return]


@torch.no_grad()
def test_what_is_read_behind_the_blocks_is_noticed() -> None:
    torch.manual_seed(0)
    model = _Skip()
    x = torch.randn(4, 8)
    in_place = InPlace(model, [x])
    assert in_place.chain is None and "read behind them" in in_place.broken
    weight = model.blocks[0][0].weight * 1.5
    found = in_place.distance({"blocks.0.0": Change(weight)})
    before = model(x)
    model.blocks[0][0].weight.data = weight
    assert found == pytest.approx(
        ((model(x) - before).square().sum() / before.square().sum()).item()
    )


class _Around(nn.Module):
    """A layer before a chain of blocks, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        self.behind = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.behind(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["before", "behind", "blocks.0.0"])
@torch.no_grad()
def test_layers_outside_the_blocks(name: str) -> None:
    torch.manual_seed(0)
    model = _Around()
    x = torch.randn(4, 8)
    in_place, before = InPlace(model, [x]), model(x)
    assert in_place.chain is not None
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    weight = layer.weight * 1.5
    found = in_place.distance({name: Change(weight)})
    layer.weight.data = weight
    error = (model(x) - before).square().sum() / before.square().sum()
    assert found == pytest.approx(error.item())


@torch.no_grad()
def test_layers_of_another_kind() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    name = "transformer.h.1.mlp.c_fc"
    kind = type(model.get_submodule(name))
    [found] = exact_divergence(model, data(), {name: preset("w3a16")})
    assert type(model.get_submodule(name)) is kind
    other = copy.deepcopy(model)
    rules = [{"layers": "*", "scheme": "float"}, {"layers": name, "scheme": "w3a16"}]
    quantize(other, {"scheme": "w3a16", "rules": rules})
    exact_products(other.get_submodule(name))
    assert found.kl == pytest.approx(by_hand(model, other, data()), rel=2e-3)


def test_bad_input_is_refused_before_anything_runs() -> None:
    model = tiny_llama()
    model.forward = None  # would fail
    with pytest.raises(ConfigError, match="layer model.lm_heat: .* there is none"):
        exact_divergence(model, data(), {"model.lm_heat": preset("w8a8")})
    with pytest.raises(ConfigError, match="layer model.norm: .* it is a LlamaRMSNorm"):
        exact_divergence(model, data(), {"model.norm": preset("w8a8")})
    with pytest.raises(ConfigError, match="layer lm_head: group_size 24 does not divide"):
        exact_divergence(model, data(), {"lm_head": preset("w4a16-g24")})
    with pytest.raises(CalibrationError, match="layer lm_head: scheme w8a8-static has static"):
        exact_divergence(model, data(), {"lm_head": preset("w8a8-static")})
    with pytest.raises(CalibrationError, match="no batches"):
        exact_divergence(tiny_llama(), [], {"lm_head": preset("w8a8")})


def test_divergence_keeps_its_digits_where_rows_are_nearly_equal() -> None:
    torch.manual_seed(0)
    logits = torch.randn(70, 5000) * 4
    other = logits + 1e-4 * torch.randn_like(logits)
    other[3] = logits[3]
    logits[4, 7], other[4, 7] = -100, 20  # a token that the float model finds impossible
    p, q = (x.double().log_softmax(-1) for x in (logits, other))
    exact = (p.exp() * (p - q)).sum(-1)
    found = divergence(logits, other)
    assert found[3] == 0
    assert found[4].item() == pytest.approx(exact[4].item(), rel=1e-5)
    kept = torch.arange(70) != 4
    assert (found - exact)[kept].abs().max() < 0.02 * exact[5:].mean()
