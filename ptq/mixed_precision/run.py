"""ptq.search: the best scheme for each layer under a budget."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ptq.calibrate import LayerStatistics, TokenSet, batches, collect
from ptq.config import (
    ActivationScheme,
    CalibrationConfig,
    Plugin,
    QuantizationConfig,
    Scheme,
    WeightScheme,
    as_config,
)
from ptq.core import QuantizedWeight
from ptq.evaluation import ReferenceLogits
from ptq.mixed_precision.asked import (
    read_ends,
    read_schemes,
    read_text,
    read_uniform,
    read_windows,
    size_limit,
)
from ptq.mixed_precision.budget import Budget, parse_budgets
from ptq.mixed_precision.candidates import Candidate, candidates, uniform
from ptq.mixed_precision.choices import ENDS, Space, default_schemes, make_space
from ptq.mixed_precision.configure import configure, reasons
from ptq.mixed_precision.problem import Problem, bytes_table
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

_WORTH = 2.0  # a uniform scheme is tried whose divergence is below so many times the best one's


def search(
    model: nn.Module,
    budget: str | Sequence[str],
    *,
    config: str | dict[str, Any] | Scheme | QuantizationConfig = "w4a16-g64-asym",
    data: str | os.PathLike[str] | TokenSet | None = None,
    evaluation: TokenSet | None = None,
    tokenizer: Any = None,
    schemes: Sequence[str | Scheme] = (),
    ends: Sequence[str | Scheme] | None = None,
    fuse: bool = True,
    rows: int = 1,
    draws: int = 4,
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

    With other budgets, some are carried out and the one whose perplexity is nearest to the float
    model's is taken: the best by prediction, the best where the change of the text's loss counts
    as much as the divergence (of recipes that round as the prediction does), uniform schemes within
    the budget, and what
    :mod:`ptq.mixed_precision.candidates` says. So no uniform scheme that was tried is better than
    what is found.

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
        ends: candidates for the embedding and the output head; none of them: as the configuration
            has them. By default they may be ``float`` or ``w8a16`` where budgets are of the whole
            checkpoint (bytes, perplexity) and the configuration says nothing of embeddings.
        fuse: layers that engines make one matrix of get one scheme.
        draws: backward passes for each sequence of ``data``.
        trials: configurations measured, at most, besides uniform ones.
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
    wanted = read_schemes(schemes) or _by_default(config, budgets)
    recipe = _recipe(config, wanted)
    others = read_uniform(against)
    at_ends = read_ends(_ends_by_default(config, budgets) if ends is None else ends)
    space = make_space(model, config, wanted, at_ends, fuse=fuse, dtype=float_dtype(config))
    sizes = [size_limit(b, space, model, config) for b in budgets if b.kind in ("bytes", "bits")]
    allocate(bytes_table(space), sizes)  # an impossible budget is found before long work
    bound = next((b.value for b in budgets if b.kind == "perplexity"), None)
    for other in others:
        plan(model, config.model_copy(update={"scheme": other}))  # whether it fits
    seen = read_text(config, data, tokenizer)
    windows = None
    if verify or against or bound is not None:
        windows = read_windows(config, evaluation, tokenizer, seen)
    kept = None if sensitivity is None else Path(sensitivity)
    job = _Job(model, config, recipe, space, seen, kept, budgets, console)
    problem = job.problem(budgets, sizes, rows, draws)
    if windows is None:
        return job.result(problem, problem.least_kl(), [])
    with ReferenceLogits() as reference:
        console.stage("evaluate float")
        reference.record(model, windows.sequences, console.bar("window"))
        prover = Prover(model, tokenizer, windows, reference, console)
        if bound is None:
            chosen, measured = job.nearest(problem, prover, trials)
        else:
            chosen, measured = job.within(problem, prover, bound, trials)
        known = {m.name for m in measured}
        for other in others:
            if f"uniform {other}" not in known:
                measured.append(prover.measure(f"uniform {other}", job.uniform(other)))
    return job.result(problem, chosen, measured)


def _by_default(config: QuantizationConfig, budgets: Sequence[Budget]) -> list[Scheme | None]:
    """Candidates where none are given: those that go with the configuration's scheme, and what a
    budget of size names."""
    named = [b.like for b in budgets if b.kind == "bytes" and b.like is not None]
    return list(dict.fromkeys([*read_schemes(default_schemes(config.scheme)), *named]))


def _ends_by_default(config: QuantizationConfig, budgets: Sequence[Budget]) -> Sequence[str]:
    """Candidates for the ends where none are given. An average of bits and a time are of the layers
    that are quantized in any case."""
    whole = all(budget.kind in ("bytes", "perplexity") for budget in budgets)
    return ENDS if whole and config.embeddings is None else ()


def _recipe(config: QuantizationConfig, wanted: Sequence[Scheme | None]) -> Recipe:
    """The recipe, which has to take every candidate; ``auto`` goes by the configuration's scheme.

    Raises:
        ConfigError: it does not.
    """
    if [step.name for step in config.recipe] == ["auto"]:
        return make_recipe(config.recipe, config.scheme)
    made = [make_recipe(config.recipe, scheme) for scheme in wanted if scheme is not None]
    return made[0] if made else make_recipe(config.recipe, config.scheme)


@dataclass(frozen=True)
class _Job:
    """What the stages of a search share."""

    model: nn.Module
    config: QuantizationConfig
    recipe: Recipe
    space: Space
    seen: TokenSet
    kept: Path | None
    budgets: tuple[Budget, ...]
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
        options = [
            [dict.fromkeys(choice.layers, option.scheme) for option in choice.options]
            for choice in self.space.choices
        ]
        kl = [[prediction.kl(option) for option in row] for row in options]
        # Errors of other codes than the recipe's are as large, but point elsewhere.
        known = float(self.recipe.plain)
        slopes = [[known * prediction.slope(option) for option in row] for row in options]
        fixed_kl = sum(prediction.kl({name: s}) for name, s in self.space.fixed.items())
        fixed_slope = known * prediction.slope(self.space.fixed)
        return Problem(self.space, kl, slopes, fixed_kl, fixed_slope, times, tuple(limits))

    def _predict(self, draws: int) -> Prediction:
        asked: dict[str, list[Scheme]] = {name: [s] for name, s in self.space.fixed.items()}
        for choice in self.space.choices:
            offered = [option.scheme for option in choice.options if option.scheme is not None]
            asked |= {name: offered for name in choice.layers if offered}
        ranges = self._ranges(asked)
        codes = f"{self.recipe} {self.recipe.options}" if self.recipe.plain else "clipped"
        how = f"{codes} {self._observer if ranges else ''}"
        origin = origin_of(self.model, self.seen, how)
        if self.kept is not None and self.kept.exists():
            found = load_prediction(self.kept)
            pairs = [(name, scheme) for name, schemes in asked.items() for scheme in schemes]
            refuse_other(found, origin, pairs, self.kept)
            return found
        found = predicted_divergence(
            self.model, self.seen, asked, quantize=_stand_in(self.recipe), draws=draws,
            statistics=self._statistics(ranges), progress=self.console.bar("sequence"),
        )  # fmt: skip
        found = replace(found, origin=origin)
        if self.kept is not None:
            save_prediction(found, self.kept)
        return found

    def _ranges(self, asked: Mapping[str, Sequence[Scheme]]) -> dict[str, ActivationScheme]:
        """Layers with a candidate whose activations are static, and how those are quantized."""
        return {
            name: scheme.activations
            for name, schemes in asked.items()
            for scheme in schemes
            if scheme.activations is not None and scheme.activations.mode == "static"
        }

    @property
    def _observer(self) -> Plugin:
        section = self.config.calibration or CalibrationConfig(data=["-"])
        return section.observer

    def _statistics(self, ranges: Mapping[str, ActivationScheme]) -> dict[str, LayerStatistics]:
        """What the inputs of these layers range over."""
        if not ranges:
            return {}
        bar = self.console.bar("batch")
        return collect(self.model, ranges, batches(self.seen, 1), self._observer, progress=bar)

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

    def _measure(self, problem: Problem, prover: Prover, candidate: Candidate) -> Measured:
        made, _ = configure(self.model, self.config, problem.options(candidate.chosen))
        return prover.measure(candidate.name, made, problem.point(candidate.chosen).kl)

    def nearest(
        self, problem: Problem, prover: Prover, trials: int
    ) -> tuple[list[int], list[Measured]]:
        """The candidate whose perplexity is nearest to the float model's, and all, it first."""
        like = [budget.like for budget in self.budgets if budget.like is not None]
        found = candidates(problem, like, trials)
        measured = [self._measure(problem, prover, candidate) for candidate in found]
        best = min(range(len(found)), key=lambda i: abs(math.log(measured[i].ratio)))
        return found[best].chosen, [measured.pop(best), *measured]

    def within(
        self, problem: Problem, prover: Prover, bound: float, trials: int
    ) -> tuple[list[int], list[Measured]]:
        """The smallest that keeps a bound on perplexity, and all that was measured, it first."""

        def attempt(change: float) -> tuple[list[int], Measured]:
            chosen = problem.least_bytes(change)
            name = f"searched, {problem.point(chosen).bytes / 1e6:.1f} MB"
            return chosen, self._measure(problem, prover, Candidate(name, chosen))

        chosen, measured = within_bound(bound, trials, attempt)
        best = problem.point(chosen)
        for other in uniform(problem):
            point = problem.point(other.chosen)
            if point.bytes < best.bytes and point.kl < _WORTH * best.kl:
                measured.append(self._measure(problem, prover, other))
                if math.log(measured[-1].ratio) <= math.log1p(bound / 100):
                    chosen, best = other.chosen, point
        measured.sort(key=lambda m: m.bytes != best.bytes)
        return chosen, measured

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
        budgets = tuple(str(budget) for budget in self.budgets)
        header = [f"searched by ptq for: {', '.join(budgets)}"]
        header.append(
            f"{point.bytes / 1e6:.1f} MB of tensors, {point.bits:.2f} bits a weight on average of "
            f"the layers chosen for; predicted KL {point.kl:.2g}"
        )
        header += [f"{'others' if i else 'measured'}: {m}" for i, m in enumerate(measured)]
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
            budgets, made, text, point, problem.curve(), tuple(layers), tuple(measured), time
        )


def _stand_in(recipe: Recipe) -> Callable[[Tensor, WeightScheme], QuantizedWeight]:
    """The recipe's own algorithm where it needs nothing but the weight, else a search of ranges."""
    if not recipe.plain:
        return clipped
    return lambda weight, scheme: (
        recipe.algorithm.quantize(weight, scheme, None, recipe.options).weight
    )
