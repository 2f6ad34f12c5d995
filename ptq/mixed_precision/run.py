"""ptq.search: the best scheme for each layer under a budget."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq.calibrate import TokenSet, calibration_tokens, evaluation_windows, overlap
from ptq.config import (
    CalibrationConfig,
    QuantizationConfig,
    Scheme,
    WeightScheme,
    as_config,
    make_section,
    preset,
)
from ptq.core import QuantizedWeight
from ptq.errors import CalibrationError, ConfigError
from ptq.evaluation import ReferenceLogits
from ptq.mixed_precision.budget import Budget, parse_budgets
from ptq.mixed_precision.choices import Space, default_schemes, make_space
from ptq.mixed_precision.configure import configure, reasons
from ptq.mixed_precision.problem import MEGABYTES, Problem, bytes_table
from ptq.mixed_precision.proof import Prover, float_dtype, within_bound
from ptq.mixed_precision.result import LayerChoice, Measured, SearchResult
from ptq.mixed_precision.solve import Limit, Table, allocate
from ptq.mixed_precision.timing import layer_times
from ptq.mixed_precision.write import to_yaml
from ptq.model import read_layers
from ptq.planning import plan
from ptq.recipe import Recipe, make_recipe
from ptq.report import Console
from ptq.sensitivity.fisher import Prediction, clipped, predicted_divergence
from ptq.sensitivity.kept import load_prediction, origin_of, refuse_other, save_prediction


def search(
    model: nn.Module,
    budget: str | Sequence[str],
    *,
    config: str | dict[str, Any] | Scheme | QuantizationConfig = "w4a16-g64-asym",
    data: str | os.PathLike[str] | TokenSet | None = None,
    evaluation: TokenSet | None = None,
    tokenizer: Any = None,
    schemes: Sequence[str | Scheme] = (),
    ends: Sequence[str | Scheme] = (),
    fuse: bool = True,
    rows: int = 1,
    draws: int = 2,
    trials: int = 5,
    verify: bool = True,
    against: Sequence[str] = (),
    sensitivity: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> SearchResult:
    """Choose a scheme for each layer so that the predictions change least within a budget.

    The divergence that each scheme causes in each layer is predicted by
    :func:`ptq.sensitivity.predicted_divergence`; an integer program finds the best allocation. With
    ``"1% perplexity"`` it is the smallest one within the bound, which is measured: configurations
    are carried out, with the recipe, until one is within a tenth of it.

    Args:
        model: a causal language model, float; left as it was. A copy is made to verify.
        budget: such as ``"90 MB"`` (tensors of the whole checkpoint), ``"as small as
            w4a16-g64"``, ``"4.5 bits"`` (on average, scales included, of the layers that are
            chosen for), ``"1% perplexity"``, ``"2.5 ms"`` or ``"as fast as w8a8"`` (all linear
            layers at ``rows`` tokens, by kernels measured here); several hold together.
        config: its rules pin layers; its recipe finds the codes.
        data: text for sensitivities (default: the configuration's calibration section).
        evaluation: windows to measure on (default: the configuration's evaluation section).
        schemes: candidates; presets, schemes, or ``"float"`` (default: by the configuration's
            scheme).
        ends: candidates for the embedding and the output head (default: as the configuration
            has them).
        fuse: layers that engines make one matrix of get one scheme.
        draws: backward passes for each sequence of ``data``.
        trials: configurations measured for a bound on perplexity, at most.
        verify: measure what was found, which needs evaluation text.
        against: schemes to measure as well, uniform, with the same recipe.
        sensitivity: file that keeps the predictions, which serve any budget: read if it is there,
            else written.

    Raises:
        ConfigError: the budget is not understood or cannot be met (the message says what can).
        CalibrationError: text is missing.
        UnsupportedError: not a causal language model, no scipy, or no configuration within the
            bound on perplexity was found.
    """
    config = as_config(config)
    console = console or Console("quiet")
    budgets = parse_budgets(budget)
    make_recipe(config.recipe, config.scheme)
    wanted = _schemes(schemes or default_schemes(config.scheme))
    others = _uniform(against)
    space = make_space(model, config, wanted, _ends(ends), fuse=fuse, dtype=float_dtype(config))
    sizes = [_size(b, space, model, config) for b in budgets if b.kind in ("bytes", "bits")]
    allocate(bytes_table(space), sizes)  # an impossible budget is found before long work
    bound = next((b.value for b in budgets if b.kind == "perplexity"), None)
    seen = _text(config, data, tokenizer)
    windows = None
    if verify or against or bound is not None:
        windows = _windows(config, evaluation, tokenizer, seen)
    kept = None if sensitivity is None else Path(sensitivity)
    job = _Job(model, config, space, seen, kept, tuple(str(b) for b in budgets), console)
    problem = job.problem(budgets, sizes, rows, draws)
    if windows is None:
        return job.result(problem, problem.least_kl(), [])
    with ReferenceLogits() as reference:
        console.stage("evaluate float")
        reference.record(model, windows.sequences, console.bar("window"))
        prover = Prover(model, tokenizer, windows, reference, console)
        chosen, measured = job.proved(problem, prover, bound, trials)
        measured += [prover.measure(str(other), job.uniform(other)) for other in others]
    return job.result(problem, chosen, measured)


@dataclass(frozen=True)
class _Job:
    """What the stages of a search share."""

    model: nn.Module
    config: QuantizationConfig
    space: Space
    seen: TokenSet
    kept: Path | None
    budgets: tuple[str, ...]
    console: Console

    def problem(
        self, budgets: Sequence[Budget], sizes: Sequence[Limit], rows: int, draws: int
    ) -> Problem:
        """All figures that the allocation needs."""
        times: Table = []
        limits = list(sizes)
        for budget in budgets:
            if budget.kind == "milliseconds":
                self.console.stage("time the kernels")
                times, limit = self._time(budget, rows)
                limits.append(limit)
        allocate(bytes_table(self.space), limits)
        self.console.stage("predict sensitivities")
        prediction = self._predict(draws)
        kl = [
            [
                prediction.kl(dict.fromkeys(choice.layers, option.scheme))
                for option in choice.options
            ]
            for choice in self.space.choices
        ]
        fixed = sum(prediction.kl({name: scheme}) for name, scheme in self._fixed.items())
        return Problem(self.space, kl, fixed, times, tuple(limits))

    @property
    def _fixed(self) -> dict[str, Scheme]:
        """Layers whose scheme is given and can be predicted: not with static activations."""
        return {
            name: scheme
            for name, scheme in self.space.fixed.items()
            if scheme.activations is None or scheme.activations.mode == "dynamic"
        }

    def _predict(self, draws: int) -> Prediction:
        asked: dict[str, list[Scheme]] = {name: [s] for name, s in self._fixed.items()}
        for choice in self.space.choices:
            offered = [option.scheme for option in choice.options if option.scheme is not None]
            asked |= {name: offered for name in choice.layers}
        origin = origin_of(self.model, self.seen)
        if self.kept is not None and self.kept.exists():
            found = load_prediction(self.kept)
            pairs = [(name, scheme) for name, schemes in asked.items() for scheme in schemes]
            refuse_other(found, origin, pairs, self.kept)
            return found
        recipe = make_recipe(self.config.recipe, self.config.scheme)
        found = predicted_divergence(
            self.model, self.seen, asked, quantize=_stand_in(recipe), draws=draws,
            progress=self.console.bar("sequence"),
        )  # fmt: skip
        found = replace(found, origin=origin)
        if self.kept is not None:
            save_prediction(found, self.kept)
        return found

    def _time(self, budget: Budget, rows: int) -> tuple[Table, Limit]:
        """Milliseconds of each option, and the limit."""
        shapes = {info.name: info.shape for info in read_layers(self.model) if info.is_linear}
        timed = {
            name: (shape[0], shape[1])
            for name, shape in shapes.items()
            if any(name in choice.layers for choice in self.space.choices)
        }
        schemes = [o.scheme for c in self.space.choices if not c.is_embedding for o in c.options]
        like = budget.like
        parameter = next(self.model.parameters())
        found = layer_times(
            timed, [*schemes, like], rows=rows,
            dtype=float_dtype(self.config) or parameter.dtype, device=parameter.device,
        )  # fmt: skip
        table = [
            [
                sum(found[timed[n], option.scheme] for n in choice.layers if n in timed)
                for option in choice.options
            ]
            for choice in self.space.choices
        ]
        bound = budget.value
        if bound is None:
            bound = sum(found[shape, like] for shape in timed.values())
        return table, Limit(budget.text, table, bound, (1.0, "ms"))

    def proved(
        self, problem: Problem, prover: Prover, bound: float | None, trials: int
    ) -> tuple[list[int], list[Measured]]:
        """The allocation, and what was measured on the way to it."""

        def attempt(chosen: list[int]) -> tuple[list[int], Measured]:
            point = problem.point(chosen)
            name = f"searched, {point.bytes / 1e6:.1f} MB"
            made, _ = configure(self.model, self.config, problem.options(chosen))
            return chosen, prover.measure(name, made, point.kl)

        if bound is None:
            chosen, found = attempt(problem.least_kl())
            return chosen, [found]
        return within_bound(bound, trials, lambda kl: attempt(problem.least_bytes(kl)))

    def uniform(self, scheme: Scheme) -> QuantizationConfig:
        """The configuration with one scheme for all layers that were chosen for."""
        return self.config.model_copy(update={"scheme": scheme})

    def result(self, problem: Problem, chosen: list[int], measured: list[Measured]) -> SearchResult:
        """The configuration, its file, the curve."""
        options = problem.options(chosen)
        made, written = configure(self.model, self.config, options)
        kl = {
            (choice.layers[0], option.name): value
            for choice, row in zip(problem.space.choices, problem.kl, strict=True)
            for option, value in zip(choice.options, row, strict=True)
        }
        point = problem.point(chosen)
        header = [f"searched by ptq for: {', '.join(self.budgets)}"]
        header.append(
            f"{point.bytes / 1e6:.1f} MB of tensors, {point.bits:.2f} bits a weight on average of "
            f"the layers chosen for; predicted KL {point.kl:.2g}"
        )
        header += [f"measured: {m}" for m in measured if m.bytes == point.bytes]
        layers = [
            LayerChoice(name, option.name, option.bytes if first else 0,
                        kl[choice.layers[0], option.name] if first else 0.0)
            for choice, option in options
            for first, name in ((i == 0, name) for i, name in enumerate(choice.layers))
        ]  # fmt: skip
        time = problem.sum(problem.milliseconds, chosen) if problem.milliseconds else None
        why = reasons(written, options, kl, made.scheme)
        text = to_yaml(made, header, written, why)
        return SearchResult(
            self.budgets, made, text, point, problem.curve(), tuple(layers), tuple(measured), time
        )


def _schemes(given: Sequence[str | Scheme]) -> list[Scheme | None]:
    """Candidates, of which ``float`` is None.

    Raises:
        ConfigError: a name is not a preset's.
    """
    found: list[Scheme | None] = []
    for item in given:
        try:
            found.append(item if isinstance(item, Scheme) else _named(item))
        except ValueError as error:
            raise ConfigError(f"candidates: {error}") from None
    return found


def _uniform(given: Sequence[str]) -> list[Scheme]:
    """Schemes to compare with.

    Raises:
        ConfigError: a name is not a preset's, or it is float, with which all is compared.
    """
    found = [scheme for scheme in _schemes(given) if scheme is not None]
    if len(found) < len(given):
        raise ConfigError("against: everything is compared with float; leave that out")
    return found


def _ends(given: Sequence[str | Scheme]) -> list[Scheme | None]:
    """Candidates for the embedding, whose rows are looked up, and the output head.

    Raises:
        ConfigError: one has quantized activations.
    """
    found = _schemes(given)
    for scheme in found:
        if scheme is not None and scheme.activations is not None:
            raise ConfigError(f"ends: {scheme} has quantized activations; give one such as w8a16")
    return found


def _named(name: str) -> Scheme | None:
    return None if name == "float" else preset(name)


def _size(budget: Budget, space: Space, model: nn.Module, config: QuantizationConfig) -> Limit:
    """The limit on bytes that a budget of bytes or bits sets."""
    dtype = float_dtype(config)
    if budget.kind == "bits":
        unit = (8 / space.weights, "bits")
        bound = (budget.value or 0) * space.weights / 8
        return Limit(budget.text, bytes_table(space), bound, unit)
    if budget.value is not None:
        bound = budget.value - space.fixed_bytes
    elif budget.like is not None:
        uniform = config.model_copy(update={"scheme": budget.like})
        bound = plan(model, uniform, dtype=dtype).bytes_after - space.fixed_bytes
    else:
        bound = plan(model, config, dtype=dtype).bytes_before - space.fixed_bytes
    return Limit(budget.text, bytes_table(space), bound, MEGABYTES, space.fixed_bytes)


def _stand_in(recipe: Recipe) -> Callable[[Tensor, WeightScheme], QuantizedWeight]:
    """The recipe's own algorithm where it needs nothing but the weight, else a search of ranges."""
    if not recipe.plain:
        return clipped
    return lambda weight, scheme: (
        recipe.algorithm.quantize(weight, scheme, None, recipe.options).weight
    )


def _text(config: QuantizationConfig, data: Any, tokenizer: Any) -> TokenSet:
    """The tokens that sensitivities are predicted on."""
    if isinstance(data, TokenSet):
        return data
    section = config.calibration
    if data is not None:
        section = make_section(CalibrationConfig, "search", data=[os.fspath(data)])
    if section is None:
        raise CalibrationError(
            "the search needs text to predict sensitivities on: add a section 'calibration:' with "
            "'data: FILE', or pass data=..."
        )
    if tokenizer is None:
        raise CalibrationError("text needs a tokenizer: pass tokenizer=...")
    return calibration_tokens(section, tokenizer)


def _windows(
    config: QuantizationConfig, given: TokenSet | None, tokenizer: Any, seen: TokenSet
) -> TokenSet:
    """The windows to measure on; never the text that was searched on."""
    if given is None:
        if config.evaluation is None:
            raise CalibrationError(
                "measuring needs text: add a section 'evaluation:' with 'data: FILE', or pass "
                "evaluation=..., or verify=False"
            )
        if tokenizer is None:
            raise CalibrationError("evaluation text needs a tokenizer: pass tokenizer=...")
        given = evaluation_windows(config.evaluation, tokenizer)
    shared = overlap(seen, given)
    if shared > 0:
        raise CalibrationError(
            f"{shared:.0%} of the evaluation text is in the text that is searched on; give other "
            "text to measure on"
        )
    return given
