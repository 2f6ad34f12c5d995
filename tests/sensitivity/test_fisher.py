"""The prediction against the quadratic form that it samples, computed outright."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ptq.algorithms import round_to_nearest
from ptq.calibrate import LayerStatistics, TokenSet
from ptq.config import Scheme, preset
from ptq.errors import CalibrationError, ConfigError, UnsupportedError
from ptq.kernels import quantize_activation
from ptq.sensitivity.fisher import _signs, predicted_divergence
from ptq.sensitivity.kept import load_prediction, origin_of, refuse_other, save_prediction
from ptq.sensitivity.places import places_of
from tests.helpers import tiny_bert, tiny_llama, tiny_tokens

W4, W8, W8A8 = preset("w4a16-g16-asym"), preset("w8a16"), preset("w8a8")
DOWN, Q = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"


def tokens(count: int = 2) -> TokenSet:
    return TokenSet(tuple(tiny_tokens(count, 9)), "0", 1, ("-",))


def weight_change(model: nn.Module, name: str, scheme: Scheme) -> Tensor:
    weight = model.get_submodule(name).weight.detach()
    return round_to_nearest(weight, scheme.weights).dequantize() - weight


def quadratic(model: nn.Module, changes: dict[str, Tensor]) -> float:
    """Half of dz^T (diag p - p p^T) dz for a change of weights, mean over the tokens; dz by central
    differences in float64."""
    exact = copy.deepcopy(model).double()
    ids = torch.stack(tokens().sequences)

    @torch.no_grad()
    def logits(step: float) -> Tensor:
        for name, change in changes.items():
            layer = exact.get_submodule(name)
            layer.weight.data = model.get_submodule(name).weight.detach().double() + step * change
        return exact(input_ids=ids, use_cache=False).logits

    dz = (logits(1e-3) - logits(-1e-3)) / 2e-3
    p = logits(0).softmax(-1)
    return 0.5 * ((p * dz**2).sum(-1) - (p * dz).sum(-1) ** 2).mean().item()


def test_it_is_the_quadratic_form_in_expectation() -> None:
    """Sequences shorter than a window: nothing is left out. 600 samples: within 5 of their
    standard errors (a squared Gaussian's relative one is sqrt(2 / n)); of layers alone and of two
    together, which count what they share. 8 bits: the change is small."""
    model = tiny_llama()
    up, ends = "model.layers.0.mlp.up_proj", ["lm_head", "model.embed_tokens"]
    names = [DOWN, up, Q, *ends]
    found = predicted_divergence(
        model, tokens(), {name: [W8] for name in names}, quantize=round_to_nearest, draws=300
    )
    changes = {name: weight_change(model, name, W8) for name in names}
    for together in ([DOWN], [Q], ["lm_head"], ["model.embed_tokens"], [DOWN, up]):
        wanted = quadratic(model, {name: changes[name] for name in together})
        predicted = found.kl(dict.fromkeys(together, W8))
        assert predicted == pytest.approx(wanted, rel=5 * (2 / 600) ** 0.5), together
        assert found.products[together[0], W8].shape == (600 * 4,)  # windows that one step is in
    assert found.kl(dict.fromkeys(names)) == 0


def test_what_moves_all_logits_alike_costs_nothing() -> None:
    """The softmax does not see it: only the second term of the covariance takes it away."""

    def shifted(rows: slice):
        def quantize(weight: Tensor, _: object) -> SimpleNamespace:
            moved = weight.clone()
            moved[rows] += 0.25
            return SimpleNamespace(dequantize=lambda: moved, input_order=None)

        return predicted_divergence(
            tiny_llama(), tokens(), {"lm_head": [W4]}, quantize=quantize, draws=5
        ).kl({"lm_head": W4})

    assert shifted(slice(None)) < 1e-6 * shifted(slice(48))


def by_hand(model: nn.Module, name: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Input [T, K] of a layer, and the gradient [T, N] of the drawn log-likelihood for its output,
    by shifting that."""
    layer, seen = model.get_submodule(name), {}
    step = torch.zeros(len(ids), layer.out_features, requires_grad=True)
    handles = [
        layer.register_forward_pre_hook(lambda _, x: seen.update(x=x[0].detach()[0])),
        layer.register_forward_hook(lambda _, __, y: y + step),
    ]
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    p = logits.detach().softmax(-1)
    signs = torch.randint(
        0, 2, p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8
    )
    drawn = p.sqrt() * (2 * signs - 1)
    (g,) = torch.autograd.grad(logits, step, drawn - p * drawn.sum(-1, keepdim=True))
    return seen["x"], g


@pytest.mark.parametrize("scheme", [W8A8, preset("w8a8-static")])
def test_rounded_inputs_add_to_the_product(scheme: Scheme) -> None:
    """Of a static range, which is -0.05 to 0.1 here, so that something saturates."""
    model, ids = tiny_llama(), tokens(1)
    ranges = {DOWN: LayerStatistics(torch.tensor([-0.05]), torch.tensor([0.1]), 9)}
    both = predicted_divergence(
        model, ids, {DOWN: [scheme]}, quantize=round_to_nearest, statistics=ranges
    )
    weights = predicted_divergence(model, ids, {DOWN: [W8]}, quantize=round_to_nearest)
    x, g = by_hand(model, DOWN, ids.sequences[0])
    if scheme == W8A8:
        rounded = quantize_activation(x, W8A8.activations).dequantize()
    else:
        assert x.abs().max() > 0.1
        rounded = (x * 1275).round().clamp(-128, 127) / 1275  # 255 steps from end to end
    weight = model.get_submodule(DOWN).weight.detach() + weight_change(model, DOWN, W8)
    wanted = (g * ((rounded - x) @ weight.T)).sum().item()
    found = both.products[DOWN, scheme][0] - weights.products[DOWN, W8][0]
    assert 2 * found.item() == pytest.approx(wanted, rel=1e-3)


def test_each_window_has_its_product() -> None:
    """150 tokens, two candidates at once: windows of 64 that begin 16 apart, with those that
    reach over an end. Their squares count each pair of steps less, the farther they are apart."""
    model = tiny_llama()
    model.config.max_position_embeddings = 256
    ids = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(2))
    schemes = [W4, preset("w3a16-g16-asym")]
    found = predicted_divergence(
        model, [{"input_ids": ids[None]}], {DOWN: schemes}, quantize=round_to_nearest, draws=1
    )
    x, g = by_hand(model, DOWN, ids)
    for scheme in schemes:
        each = (g * (x @ weight_change(model, DOWN, scheme).T)).sum(1).double()
        ends = range(16, 160 + 64, 16)
        wanted = torch.stack([each[max(0, end - 64) : end].sum() for end in ends]) / 2
        made = found.products[DOWN, scheme]
        assert (made - wanted).abs().max() < 1e-5 * each.abs().sum()
        steps = [part.sum() for part in each.split(16)]
        weighted = sum(
            a * b * max(0, 1 - abs(i - j) / 4)
            for i, a in enumerate(steps)
            for j, b in enumerate(steps)
        )
        assert made.square().sum().item() == pytest.approx(weighted.item(), rel=1e-4)


@pytest.mark.parametrize("leaf", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_an_attention_is_part_of_the_change(leaf: str) -> None:
    """The product is that of what changes behind the attention, softmax and all."""
    model, ids = tiny_llama(), tokens(1)
    name, behind = f"model.layers.1.self_attn.{leaf}", "model.layers.1.self_attn.o_proj"
    scheme = preset("w3a16-g16-asym")
    found = predicted_divergence(
        model, ids, {name: [scheme]}, quantize=round_to_nearest, draws=1
    ).products[name, scheme]
    _, g = by_hand(model, behind, ids.sequences[0])
    other = copy.deepcopy(model)
    other.get_submodule(name).weight.data += weight_change(model, name, scheme)
    outputs = []
    for each in (model, other):
        handle = each.get_submodule(behind).register_forward_hook(
            lambda _, __, y: outputs.append(y.detach()[0])
        )
        each(input_ids=ids.sequences[0][None])
        handle.remove()
    wanted = (g * (outputs[1] - outputs[0])).sum().item()
    assert 2 * found[0].item() == pytest.approx(wanted, rel=1e-3)


def test_the_slope_is_that_of_the_texts_loss() -> None:
    """By central differences in float64; 8 bits, so that an attention is nearly linear. What is
    padded has no loss, nor has what precedes it."""
    model, ids = tiny_llama(), tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    names = [DOWN, Q, "lm_head", "model.embed_tokens"]
    found = predicted_divergence(
        model, [{"input_ids": ids, "attention_mask": mask}], {name: [W8] for name in names},
        quantize=round_to_nearest,
    )  # fmt: skip

    @torch.no_grad()
    def loss(name: str, step: float) -> float:
        exact = copy.deepcopy(model).double()
        exact.get_submodule(name).weight.data += step * weight_change(model, name, W8).double()
        log_p = exact(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
        each = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
        return each[mask[:, 1:].bool()].mean().item()

    for name in names:
        wanted = (loss(name, 1e-3) - loss(name, -1e-3)) / 2e-3
        assert found.slope({name: W8}) == pytest.approx(wanted, rel=0.05, abs=1e-5), name
    assert found.slope({DOWN: W8, Q: None}) == found.slopes[DOWN, W8]


def test_bfloat16_keeps_what_8_bits_change() -> None:
    """Modules run again in float32: what is left is the rounding of their inputs and gradients,
    whose signs are the same ones."""
    names = [DOWN, "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
    asked = {name: [W8] for name in names}
    exact = tiny_llama(dtype=torch.bfloat16).float()
    fine = predicted_divergence(exact, tokens(), asked, quantize=round_to_nearest, draws=50)
    rough = predicted_divergence(
        tiny_llama(dtype=torch.bfloat16), tokens(), asked, quantize=round_to_nearest, draws=50
    )
    for name in names:
        assert rough.kl({name: W8}) == pytest.approx(fine.kl({name: W8}), rel=0.1)


def test_where_layers_are_looked_at() -> None:
    """Behind their parent inside a block, unless that is a mere list; else behind themselves."""
    model = tiny_llama()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(4, 4)])
    listed = "model.layers.0.mlp.experts.0"
    found = places_of(model, [Q, DOWN, "model.layers.1.self_attn.v_proj", listed, "lm_head"])
    assert {place.name: place.layers for place in found} == {
        "model.layers.1.self_attn": ["q_proj", "v_proj"],
        "model.layers.0.mlp": ["down_proj"],
        listed: [""],
        "lm_head": [""],
    }


def test_a_layer_that_is_not_called_changes_nothing() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(16, 4)])
    listed = "model.layers.0.mlp.experts.0"
    found = predicted_divergence(model, tokens(), {listed: [W4], DOWN: [W4]})
    assert found.kl({listed: W4}) == found.slope({listed: W4}) == 0
    assert found.kl({listed: W4, DOWN: W4}) == found.kl({DOWN: W4}) > 0


def test_padding_does_not_count() -> None:
    model = tiny_llama()
    ids = tiny_tokens(1, 9)
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = predicted_divergence(
        model, [{"input_ids": ids, "attention_mask": mask}], {DOWN: [W4]}, draws=100
    )
    plain = predicted_divergence(model, [{"input_ids": ids[:, :6]}], {DOWN: [W4]}, draws=100)
    assert padded.tokens == plain.tokens == 6
    drawn = _signs(torch.randn(1, 9, 97), mask.bool(), torch.Generator())
    assert (drawn[0, 6:] == 0).all() and (drawn[0, :6] != 0).all()
    assert padded.kl({DOWN: W4}) == pytest.approx(plain.kl({DOWN: W4}), rel=0.8)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    predicted_divergence(model, tokens(), {DOWN: [W4]})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad and parameter.grad is None
    assert model.training and not model.get_submodule(DOWN)._forward_hooks
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("candidates", "kind", "words"),
    [
        ({"model.layers.7.x": [W4]}, ConfigError, "layer model.layers.7.x: expected a linear"),
        ({"model.norm": [W4]}, ConfigError, "it is a LlamaRMSNorm"),
        ({Q: [preset("w4a16-g64")]}, ConfigError, f"layer {Q}: "),
        ({Q: [preset("w8a8-static")]}, CalibrationError, f"layer {Q}: scheme w8a8-static"),
    ],
)
def test_what_cannot_be_predicted(candidates, kind, words) -> None:
    with pytest.raises(kind, match=words):
        predicted_divergence(tiny_llama(), tokens(), candidates)


def test_other_refusals() -> None:
    with pytest.raises(UnsupportedError):
        predicted_divergence(tiny_bert(), tokens(), {})
    with pytest.raises(CalibrationError, match="no tokens"):
        predicted_divergence(tiny_llama(), [], {DOWN: [W4]})


def test_a_kept_prediction_comes_back(tmp_path) -> None:
    model, path = tiny_llama(), tmp_path / "kept.safetensors"
    origin = origin_of(model, tokens())
    made = predicted_divergence(model, tokens(), {DOWN: [W4, W8A8], Q: [W4]}, draws=2)
    save_prediction(replace(made, origin=origin), path)
    found = load_prediction(path)
    assert found.products.keys() == made.products.keys()
    assert all(torch.equal(found.products[key], made.products[key]) for key in made.products)
    assert (found.tokens, found.draws, found.origin) == (made.tokens, 2, origin)
    assert found.slopes == made.slopes
    refuse_other(found, origin_of(tiny_llama(), tokens()), [(Q, W4)], path)
    with pytest.raises(CalibrationError, match="another model or text"):
        refuse_other(found, origin_of(tiny_llama(seed=1), tokens()), [], path)
    with pytest.raises(CalibrationError, match="another model or text"):
        other = replace(tokens(), sha256="1")
        refuse_other(found, origin_of(tiny_llama(), other), [], path)
    with pytest.raises(CalibrationError, match=f"no prediction for w8a8 in layer {Q}"):
        refuse_other(found, origin, [(Q, W8A8)], path)
    path.write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="cannot be read as predicted sensitivities"):
        load_prediction(path)
