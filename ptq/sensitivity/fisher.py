"""A cheap prediction of each layer's sensitivity, for all layers and schemes in one pass.

To second order, what a change of an output does to the predictions is a quadratic form in the
Fisher information. With labels drawn from the model's own predictions, and g the gradient of their
log-likelihood, ``KL = 1/2 E[(sum over tokens of g . dy)^2]`` (Martens 2020, New Insights and
Perspectives on the Natural Gradient Method, section 5; Theis et al. 2018 used it for pruning). One
run forwards and few backwards give samples of every layer's product at once. The change dy is that
of the module that the layer is part of, as it really is (:mod:`ptq.sensitivity.places`).

With the text's own next tokens for labels, the mean of the products is the first order of what a
change does to the text's loss. The model is at no minimum of that on most texts, so it is no less
than the second order, and it adds up over layers.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.algorithms import round_to_nearest, rtn
from ptq.algorithms.rtn import RtnOptions
from ptq.calibrate import LayerStatistics, TokenSet, batches, batches_of, call
from ptq.calibrate.inputs import padding_mask
from ptq.config import Scheme, WeightScheme
from ptq.core import QuantizedWeight
from ptq.errors import CalibrationError, ConfigError
from ptq.model import eval_mode, require_causal, unfolded
from ptq.sensitivity.change import Change, change_of
from ptq.sensitivity.exact import codes_of
from ptq.sensitivity.places import Place, places_of, recorded

Quantize = Callable[[Tensor, WeightScheme], QuantizedWeight]
Progress = Callable[[Iterable[Any]], Iterable[Any]]

_WINDOW = 64  # neighbouring tokens whose products are summed before they are squared
_STEP = 16  # tokens from one such window to the next
_ROWS = 64  # rows of float32 probabilities that exist at a time


@dataclass(frozen=True, eq=False)
class Prediction:
    """Products of the gradient with the change that a scheme makes of an output.

    Args:
        tokens: predictions that were looked at.
        products: by layer and scheme, float64 [samples]: one for each window of neighbouring tokens
            of each sequence and draw.
        slopes: by layer and scheme, the change of the text's own loss to first order, mean over
            its tokens, nats; below zero where the change helps.
        draws: of signs, for each sequence.
        origin: a hash of the layers' weights and of the text.
    """

    tokens: int
    products: dict[tuple[str, Scheme], Tensor]
    slopes: dict[tuple[str, Scheme], float]
    draws: int
    origin: str = ""

    def kl(self, changes: Mapping[str, Scheme | None]) -> float:
        """Predicted divergence, mean over the tokens, nats, of changing these layers together.

        Their products are added before they are squared, so it counts what layers have in common.

        Args:
            changes: by layer, its scheme, or None where it stays float.
        """
        chosen = [self.products[name, s] for name, s in changes.items() if s is not None]
        if not chosen:
            return 0.0
        total = torch.stack(chosen).sum(0)
        return total.square().sum().item() / (2 * self.tokens * self.draws)

    def slope(self, changes: Mapping[str, Scheme | None]) -> float:
        """Predicted change of the text's loss to first order, of these layers together, nats."""
        return sum(self.slopes[name, s] for name, s in changes.items() if s is not None)


def clipped(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Round to nearest within searched ranges: what stands in for slower algorithms."""
    return rtn(weight, scheme, None, RtnOptions(clip=True)).weight


def predicted_divergence(
    model: nn.Module,
    data: TokenSet | Iterable[Any],
    candidates: Mapping[str, Iterable[Scheme]],
    *,
    quantize: Quantize = clipped,
    statistics: Mapping[str, LayerStatistics] | None = None,
    draws: int = 4,
    seed: int = 0,
    progress: Progress = iter,
) -> Prediction:
    """Predict the divergence from the float model's predictions for each layer and scheme.

    Costs, for each sequence, a forward pass, a backward pass for each draw and one more, and for
    each layer and scheme a run of the module that the layer is part of (an attention, an MLP):
    about three forward passes a scheme, whatever the number of blocks. Instead of labels, random
    signs are drawn: ``v = sqrt(p) * e - p (sqrt(p) . e)`` has the covariance ``diag(p) - p p^T`` of
    ``onehot(label) - p`` without its rare large values.

    The sum over a whole sequence is exact to second order behind the module, in expectation, but
    it is one sample a sequence. So products are summed over windows of 64 neighbouring tokens that
    begin 16 apart, which makes Bartlett's estimate of the variance of the sum (Newey and West
    1987): it leaves out what distant tokens have in common, and varies less than windows side by
    side.

    Codes are those of ``quantize``; a recipe that corrects errors does better than they do, by
    about the same factor in every layer. Its slopes are others.

    Held at a time, beside the model and its packed codes: of one batch, what a backward pass needs,
    and of each module ``1 + draws`` gradients of its output.

    Args:
        model: a causal language model, float; left as it was. Linear layers and embeddings.
        data: token windows, or batches (mappings with ``input_ids``) as calibration takes them.
        candidates: by name of the layer (as a plan has them), schemes.
        statistics: the ranges of static activations (:func:`ptq.calibrate.collect`).
        draws: of signs, for each batch.

    Raises:
        ConfigError: no such layer, or a scheme does not fit it.
        CalibrationError: no data, or a static scheme has no statistics.
        ModelError: a gradient is not finite.
        UnsupportedError: the model has no next-token logits, or a module returns no tensor.
    """
    require_causal(model)
    asked = {name: tuple(schemes) for name, schemes in candidates.items()}
    asked = {name: schemes for name, schemes in asked.items() if schemes}
    given = batches(data, 1) if isinstance(data, TokenSet) else batches_of(data)
    generator = torch.Generator().manual_seed(seed)
    with unfolded(model, asked), eval_mode(model), _without_gradients(model):
        seen = statistics or {}
        watches = {n: _watch(model, n, asked[n], quantize, seen.get(n)) for n in asked}
        places = places_of(model, asked)
        tokens = labels = 0
        for index, batch in enumerate(progress(list(given))):
            mask = _sample(model, batch, index, places, draws, generator)
            for place in places:
                for name, products in place.products(lambda name: watches[name].changes()):
                    watches[name].see(products, draws)
                place.calls.clear()
            tokens += int(mask.sum())
            labels += int(_labelled(mask).sum())
    if tokens == 0:
        raise CalibrationError("the prediction of sensitivities got no tokens; give text")
    slopes = {
        (name, scheme): slope / max(1, labels)
        for name, watch in watches.items()
        for scheme, slope in watch.slopes.items()
    }
    return Prediction(tokens, _products(watches), slopes, draws)


@dataclass(eq=False)
class _Watch:
    """One layer, and what each candidate makes of it.

    Args:
        codes: by scheme, with the input's static scale if that has one.
        found: by scheme, products by window of tokens, of each run and draw.
        slopes: by scheme, the first order of the text's loss, summed over tokens.
    """

    layer: nn.Linear | nn.Embedding
    codes: dict[Scheme, QuantizedWeight]
    found: dict[Scheme, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    slopes: dict[Scheme, float] = field(default_factory=lambda: defaultdict(float))

    def changes(self) -> Iterator[Change]:
        """By scheme."""
        own = self.layer.weight.detach()
        for scheme, codes in self.codes.items():
            yield change_of(codes, scheme, own, "both")

    def see(self, products: list[Tensor], draws: int) -> None:
        """Take a run's products by scheme, each [1 + draws, rows], of the text's labels first; none
        of a layer that was not called."""
        none = torch.zeros(1 + draws, 1)
        for scheme, found in zip(self.codes, products or [none] * len(self.codes), strict=True):
            self.slopes[scheme] -= found[0].double().sum().item()
            self.found[scheme] += [_windows(drawn) for drawn in found[1:]]


def _windows(products: Tensor) -> Tensor:
    """Sums of the products [rows] over each window, those that reach over an end too, float64; so
    divided that each product counts once when they are squared."""
    steps = nn.functional.pad(products.double().cpu(), (0, -len(products) % _STEP))
    steps = steps.reshape(-1, _STEP).sum(1)
    count = _WINDOW // _STEP
    around = nn.functional.pad(steps, (count - 1, count - 1))
    shifted = [around[start : start + len(steps) + count - 1] for start in range(count)]
    return torch.stack(shifted).sum(0) / math.sqrt(count)


def _products(watches: Mapping[str, _Watch]) -> dict[tuple[str, Scheme], Tensor]:
    """All samples, those of each run filled up to one length, so that layers can be added."""
    runs = max(len(f) for w in watches.values() for f in w.found.values())
    lengths = [
        max(len(f[run]) for w in watches.values() for f in w.found.values()) for run in range(runs)
    ]
    pad = torch.nn.functional.pad
    return {
        (name, scheme): torch.cat(
            [pad(v, (0, length - len(v))) for v, length in zip(values, lengths, strict=True)]
        )
        for name, watch in watches.items()
        for scheme, values in watch.found.items()
    }


def _watch(
    model: nn.Module,
    name: str,
    schemes: tuple[Scheme, ...],
    quantize: Quantize,
    seen: LayerStatistics | None,
) -> _Watch:
    layer = dict(model.named_modules()).get(name)
    if type(layer) not in (nn.Linear, nn.Embedding):
        found = "there is none" if layer is None else f"it is a {type(layer).__name__}"
        raise ConfigError(f"layer {name}: expected a linear layer or embedding, {found}")
    assert isinstance(layer, nn.Linear | nn.Embedding)
    weight = layer.weight.detach()
    if layer.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        quantize = round_to_nearest  # embeddings are, whatever the recipe
    return _Watch(layer, {s: codes_of(name, weight, s, seen, quantize) for s in schemes})


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Within it, no parameter collects a gradient; afterwards those do that did."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _sample(
    model: nn.Module,
    batch: Any,
    index: int,
    places: list[Place],
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Run one batch forwards once, and backwards for its labels and for each draw.

    Returns:
        bool [B, T], false where padded.
    """
    with _differentiable(model), recorded(places), torch.enable_grad():
        logits = call(model, batch, index).logits
        given = padding_mask(batch)
        mask = torch.ones(logits.shape[:2], dtype=torch.bool) if given is None else given.cpu()
        logits.backward(
            _to_labels(logits.detach(), batch["input_ids"], mask), retain_graph=draws > 0
        )
        for draw in range(draws):
            logits.backward(_signs(logits.detach(), mask, generator), retain_graph=draw + 1 < draws)
    return mask


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Within it, what the embedding gives has a gradient."""

    def start(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        output.requires_grad_(True)

    handle = model.get_input_embeddings().register_forward_hook(start)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def _labelled(mask: Tensor) -> Tensor:
    """Which tokens have a next one; bool [B, T] as the mask."""
    following = nn.functional.pad(mask[:, 1:], (0, 1))
    return mask & following


def _to_labels(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The gradient [B, T, V] of the text's log-likelihood: ``onehot(label) - softmax(logits)``.

    Args:
        ids: int [B, T]; mask: bool [B, T], false where padded.
    """
    made = torch.empty_like(logits)
    labels = ids.roll(-1, 1).to(logits.device)
    labelled = _labelled(mask).to(logits.device)
    for row in range(len(logits)):
        made[row] = -logits[row].float().softmax(-1)
        made[row].scatter_add_(1, labels[row, :, None], torch.ones_like(made[row, :, :1]))
    made[~labelled] = 0
    return made


def _signs(logits: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Random vectors [B, T, V] with the covariance of ``onehot(label) - softmax(logits)``.

    Args:
        mask: bool [B, T], false where padded.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    made = torch.empty_like(flat)
    for start in range(0, len(flat), _ROWS):
        rows = slice(start, start + _ROWS)
        p = flat[rows].float().softmax(-1)
        signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8)
        drawn = p.sqrt() * (2 * signs - 1).to(p.device)
        made[rows] = drawn - p * drawn.sum(-1, keepdim=True)
    made[~mask.reshape(-1).to(made.device)] = 0
    return made.reshape(logits.shape)
