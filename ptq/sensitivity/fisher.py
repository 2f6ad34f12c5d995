"""A cheap prediction of each layer's sensitivity, for all layers and schemes in one pass.

To second order, what a change of weights does to the predictions is a quadratic form in the Fisher
information. With labels drawn from the model's own predictions, and g the gradient of their
log-likelihood, ``KL = 1/2 E[(sum over tokens of g . dy)^2]``, where ``dy = x dW^T`` is the change
of a layer's output (Martens 2020, New Insights and Perspectives on the Natural Gradient Method,
section 5; Theis et al. 2018 used it for pruning). One run forwards and backwards gives a sample of
every layer's product at once.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptq.algorithms import round_to_nearest, rtn, with_static_input
from ptq.algorithms.rtn import RtnOptions
from ptq.calibrate import LayerStatistics, TokenSet, batches, batches_of, call
from ptq.calibrate.inputs import padding_mask
from ptq.config import Scheme, WeightScheme
from ptq.core import QuantizedWeight
from ptq.errors import CalibrationError, ConfigError, ModelError, PTQError
from ptq.model import eval_mode, require_causal, unfolded
from ptq.sensitivity.change import round_trip

Quantize = Callable[[Tensor, WeightScheme], QuantizedWeight]
Progress = Callable[[Iterable[Any]], Iterable[Any]]

_CHUNK = 64  # neighbouring tokens whose products are summed before they are squared
_ELEMENTS = 1 << 22  # of the chunks' weight gradients that exist at a time
_ROWS = 64  # rows of float32 probabilities that exist at a time


@dataclass(frozen=True, eq=False)
class Prediction:
    """Products of the gradient with the change that a scheme makes of a layer's output.

    Args:
        tokens: predictions that were looked at.
        products: by layer and scheme, float64 [samples]: one for each chunk of neighbouring tokens
            of each sequence and draw.
        draws: of signs, for each sequence.
        origin: a hash of the layers' weights and of the text.
    """

    tokens: int
    products: dict[tuple[str, Scheme], Tensor]
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
    draws: int = 1,
    seed: int = 0,
    progress: Progress = iter,
) -> Prediction:
    """Predict the divergence from the float model's predictions for each layer and scheme.

    Costs a forward and a backward pass for each sequence and draw, whatever the number of layers
    and candidates. Instead of labels, random signs are drawn: ``v = sqrt(p) * e - p (sqrt(p) . e)``
    has the covariance ``diag(p) - p p^T`` of ``onehot(label) - p`` without its rare large values.
    Products are summed over 64 neighbouring tokens before they are squared. In expectation the
    whole sequence's sum is exact to second order, but it is one sample a sequence; the chunks
    leave out what distant tokens have in common, and are many.

    Codes are those of ``quantize``; a recipe that corrects errors does better than they do, by
    about the same factor in every layer.

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
        UnsupportedError: the model has no next-token logits.
    """
    require_causal(model)
    asked = {name: tuple(schemes) for name, schemes in candidates.items()}
    asked = {name: schemes for name, schemes in asked.items() if schemes}
    given = batches(data, 1) if isinstance(data, TokenSet) else batches_of(data)
    generator = torch.Generator().manual_seed(seed)
    with unfolded(model, asked), eval_mode(model), _without_gradients(model):
        seen = statistics or {}
        watches = {n: _watch(model, n, asked[n], quantize, seen.get(n)) for n in asked}
        tokens = 0
        for index, batch in enumerate(progress(list(given))):
            tokens += _sample(model, batch, index, list(watches.values()), draws, generator)
    if tokens == 0:
        raise CalibrationError("the prediction of sensitivities got no tokens; give text")
    return Prediction(tokens, _products(watches), draws)


@dataclass(eq=False)
class _Watch:
    """One layer, and what each candidate changes.

    Args:
        errors: by scheme, the weight's change, in bfloat16 (two bytes a weight and candidate).
        inputs: by scheme with static activations, scale and zero point of the input.
        sums: of the current run, by scheme: products by chunk; a layer may run several times.
    """

    name: str
    layer: nn.Linear | nn.Embedding
    errors: dict[Scheme, Tensor]
    inputs: dict[Scheme, tuple[Tensor | None, Tensor | None]]
    found: dict[Scheme, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[Scheme, Tensor] = field(default_factory=dict)

    def see(self, x: Tensor, gradient: Tensor) -> None:
        """Called in the backward pass with the layer's input and its output's gradient."""
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        if not bool(rows.isfinite().all()):
            raise ModelError(f"layer {self.name}: the gradient of its output is not finite")
        for scheme, products in self._by_chunk(x, rows).items():
            earlier = self.sums.get(scheme)
            self.sums[scheme] = products if earlier is None else _added(earlier, products)

    def _by_chunk(self, x: Tensor, gradient: Tensor) -> dict[Scheme, Tensor]:
        if isinstance(self.layer, nn.Embedding):
            ids = x.reshape(-1)
            return {s: _chunks((gradient * e[ids]).sum(-1)) for s, e in self.errors.items()}
        rows = x.reshape(-1, x.shape[-1]).float()
        products = _weight_products(rows, gradient, list(self.errors.values()))
        return {
            scheme: products[:, i] + self._activations(scheme, rows, gradient)
            for i, scheme in enumerate(self.errors)
        }

    def _activations(self, scheme: Scheme, x: Tensor, gradient: Tensor) -> Tensor | float:
        """The same of the rounding of the layer's input."""
        if scheme.activations is None:
            return 0.0
        scale, zero_point = self.inputs.get(scheme, (None, None))
        change = round_trip(x, scheme.activations, scale, zero_point) - x
        return _chunks(((gradient @ self.layer.weight.float()) * change).sum(-1))

    def close(self) -> None:
        """The run is over: its sums are samples."""
        for scheme in self.errors:
            self.found[scheme].append(self.sums.pop(scheme, torch.zeros(1).double()))


def _chunks(products: Tensor) -> Tensor:
    """Sums of the products [rows] over each chunk, float64."""
    return torch.stack([part.double().sum() for part in torch.split(products, _CHUNK)])


def _weight_products(x: Tensor, gradient: Tensor, errors: list[Tensor]) -> Tensor:
    """Products of the weight's gradient over each chunk with each change of it, float64
    [chunks, changes].

    Args:
        x: float32 [rows, K]; gradient: float32 [rows, N]; errors: of the weight, each [N, K].
    """
    padding = (0, 0, 0, -len(x) % _CHUNK)
    parts = torch.nn.functional.pad(x, padding).reshape(-1, _CHUNK, x.shape[1])
    sides = torch.nn.functional.pad(gradient, padding).reshape(len(parts), _CHUNK, -1)
    total = torch.zeros(len(parts), len(errors), dtype=torch.float64, device=x.device)
    step = max(1, _ELEMENTS // (len(parts) * x.shape[1]))  # rows of the weight at a time
    for start in range(0, gradient.shape[1], step):
        rows = slice(start, start + step)
        made = torch.bmm(sides[..., rows].transpose(1, 2), parts).flatten(1)
        changes = torch.stack([error[rows].flatten().float() for error in errors])
        total += (made @ changes.T).double()
    return total


def _added(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two vectors, the shorter one filled up with zeros."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return longer + torch.nn.functional.pad(shorter, (0, len(longer) - len(shorter)))


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
    if layer.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        quantize = round_to_nearest  # embeddings are, whatever the recipe
    errors, inputs = {}, {}
    for scheme in schemes:
        try:
            made = quantize(layer.weight.detach(), scheme.weights)
        except PTQError as error:
            raise type(error)(f"layer {name}: {error}") from None
        errors[scheme] = (made.dequantize() - layer.weight.detach()).to(torch.bfloat16)
        if scheme.activations is not None and scheme.activations.mode == "static":
            if seen is None:
                raise CalibrationError(
                    f"layer {name}: scheme {scheme} has static activations, whose range is not "
                    "given: pass statistics=ptq.calibrate.collect(...)"
                )
            made = with_static_input(made, scheme.activations, seen.low, seen.high)
            inputs[scheme] = made.input_scale, made.input_zero_point
    return _Watch(name, layer, errors, inputs)


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
    watches: list[_Watch],
    draws: int,
    generator: torch.Generator,
) -> int:
    """Run one batch forwards once and backwards for each draw; the number of its predictions."""
    with _hooked(model, watches), torch.enable_grad():
        logits = call(model, batch, index).logits
        mask = padding_mask(batch)
        for draw in range(draws):
            signs = _signs(logits.detach(), mask, generator)
            logits.backward(signs, retain_graph=draw + 1 < draws)
            for watch in watches:
                watch.close()
    return logits.shape[0] * logits.shape[1] if mask is None else int(mask.sum())


@contextmanager
def _hooked(model: nn.Module, watches: list[_Watch]) -> Iterator[None]:
    """Within it, each watched layer's output tells its gradient."""

    def watching(watch: _Watch) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            x = arguments[0].detach()
            output.register_hook(partial(watch.see, x))  # type: ignore[no-untyped-call]

        return hook

    def start(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        output.requires_grad_(True)

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embedding.register_forward_hook(start)]
    handles += [watch.layer.register_forward_hook(watching(watch)) for watch in watches]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _signs(logits: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """Random vectors [B, T, V] with the covariance of ``onehot(label) - softmax(logits)``.

    Args:
        mask: bool [B, T], false where padded, or None.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    made = torch.empty_like(flat)
    for start in range(0, len(flat), _ROWS):
        rows = slice(start, start + _ROWS)
        p = flat[rows].float().softmax(-1)
        signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8)
        drawn = p.sqrt() * (2 * signs - 1).to(p.device)
        made[rows] = drawn - p * drawn.sum(-1, keepdim=True)
    if mask is not None:
        made[~mask.reshape(-1).to(made.device)] = 0
    return made.reshape(logits.shape)
