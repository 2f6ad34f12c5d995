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
from tests.helpers import tiny_bert, tiny_llama, tiny_tokens

W4, W8A8 = preset("w4a16-g16-asym"), preset("w8a8")
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
    """Sequences shorter than a chunk: nothing is left out. 600 samples: within 5 of their
    standard errors (a squared Gaussian's relative one is sqrt(2 / n)); of layers alone and of two
    together, which count what they share."""
    model = tiny_llama()
    up, ends = "model.layers.0.mlp.up_proj", ["lm_head", "model.embed_tokens"]
    names = [DOWN, up, Q, *ends]
    found = predicted_divergence(
        model, tokens(), {name: [W4] for name in names}, quantize=round_to_nearest, draws=300
    )
    changes = {name: weight_change(model, name, W4) for name in names}
    for together in ([DOWN], [Q], ["lm_head"], ["model.embed_tokens"], [DOWN, up]):
        wanted = quadratic(model, {name: changes[name] for name in together})
        predicted = found.kl(dict.fromkeys(together, W4))
        assert predicted == pytest.approx(wanted, rel=5 * (2 / 600) ** 0.5), together
        assert found.products[together[0], W4].shape == (600,)
    assert found.kl(dict.fromkeys(names)) == 0


def test_what_moves_all_logits_alike_costs_nothing() -> None:
    """The softmax does not see it: only the second term of the covariance takes it away."""

    def shifted(rows: slice):
        def quantize(weight: Tensor, _: object) -> SimpleNamespace:
            moved = weight.clone()
            moved[rows] += 0.25
            return SimpleNamespace(dequantize=lambda: moved)

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
    """Of a static range, which is -0.5 to 1 here, so that something saturates."""
    model, ids = tiny_llama(), tokens(1)
    ranges = {Q: LayerStatistics(torch.tensor([-0.5]), torch.tensor([1.0]), 9)}
    both = predicted_divergence(
        model, ids, {Q: [scheme]}, quantize=round_to_nearest, statistics=ranges
    )
    weights = predicted_divergence(model, ids, {Q: [preset("w8a16")]}, quantize=round_to_nearest)
    x, g = by_hand(model, Q, ids.sequences[0])
    if scheme == W8A8:
        rounded = quantize_activation(x, W8A8.activations).dequantize()
    else:
        assert x.abs().max() > 1
        rounded = (x * 127.5).round().clamp(-128, 127) / 127.5  # 255 steps from end to end
    wanted = (g * ((rounded - x) @ model.get_submodule(Q).weight.T)).sum().item()
    found = (both.products[Q, scheme] - weights.products[Q, preset("w8a16")]).item()
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("elements", [1 << 22, 500])
def test_each_chunk_has_its_product(monkeypatch, elements: int) -> None:
    """150 tokens, some rows of the weight's gradient at a time, two candidates at once."""
    monkeypatch.setattr("ptq.sensitivity.fisher._ELEMENTS", elements)
    model = tiny_llama()
    model.config.max_position_embeddings = 256
    ids = torch.randint(0, 97, (150,), generator=torch.Generator().manual_seed(2))
    schemes = [W4, preset("w3a16-g16-asym")]
    found = predicted_divergence(
        model, [{"input_ids": ids[None]}], {Q: schemes}, quantize=round_to_nearest
    )
    x, g = by_hand(model, Q, ids)
    for scheme in schemes:
        each = (g * (x @ weight_change(model, Q, scheme).T)).sum(1)
        wanted = torch.stack([part.sum() for part in each.split(64)])
        size = each.abs().sum()  # changes are kept in bfloat16
        assert (found.products[Q, scheme].float() - wanted).abs().max() < 2**-8 * size


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
