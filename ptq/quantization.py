"""Quantizing a model in memory: calibrate, transform, quantize, swap."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ptq import checkpoint
from ptq.blockwise import Blockwise, quantize_plainly
from ptq.calibrate import (
    LayerStatistics,
    TokenSet,
    batches,
    batches_of,
    calibration_tokens,
    collect,
)
from ptq.config import CalibrationConfig, Plugin, QuantizationConfig, Scheme, as_config
from ptq.errors import CalibrationError
from ptq.kv_cache import check_cache, quantize_cache
from ptq.model import StreamedModel, block_lists, check_finite, unfolded
from ptq.modules import share_inputs
from ptq.planning import Plan, plan
from ptq.recipe import Recipe, make_recipe
from ptq.report import Console
from ptq.resume import Work, give_back, steady
from ptq.swap import See, quantize_embeddings, quantize_layers


@dataclass(frozen=True)
class QuantizationResult:
    """What :func:`quantize` did; prints as the plan that it carried out.

    Args:
        notes: what each step of the recipe did.
        remedies: where a step could not do what it should, and what was done instead.
    """

    model: nn.Module
    plan: Plan
    config: QuantizationConfig
    statistics: dict[str, LayerStatistics]
    seconds: float
    recipe: str = "rtn"
    notes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.plan}\nDone in {self.seconds:.1f} s."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{self.plan._repr_html_()}<p>Done in {self.seconds:.1f} s.</p>"


def quantize(
    model: nn.Module,
    scheme: str | dict[str, Any] | Scheme | QuantizationConfig,
    *,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    console: Console | None = None,
) -> QuantizationResult:
    """Quantize the linear layers of a model, in place.

    Args:
        model: any ``nn.Module`` with ``nn.Linear`` layers, transformers' ``Conv1D`` or fused
            experts, float, on any device.
        scheme: a preset such as ``"w4a16-g64"``, a mapping as in YAML, or a configuration.
        calibration: batches for static activations, static scales of the key-value cache, and
            recipes that look at data: tensors, tuples, or mappings of keyword arguments; without
            it, the configuration's calibration section is used, which needs ``tokenizer``.
        console: where progress goes (default: bars on standard error).

    Raises:
        ConfigError, UnsupportedError: the request does not fit the model; nothing was changed.
        CalibrationError: data is needed and there is none, or it cannot be used.
        ModelError: NaN or Inf in a weight; nothing was changed.
    """
    return quantize_with(model, as_config(scheme), calibration, tokenizer, console or Console())


def quantize_with(
    model: nn.Module,
    config: QuantizationConfig,
    calibration: Iterable[Any] | None,
    tokenizer: Any,
    console: Console,
    streamed: StreamedModel | None = None,
    store: Work | None = None,
    see: See | None = None,
) -> QuantizationResult:
    """As :func:`quantize`.

    Args:
        streamed: fills the model's blocks, where they have no weights yet; bad weights are then
            found block by block.
        store: has what is finished, and gets it.
        see: told about each layer's weight and codes.
    """
    start = time.perf_counter()
    made = plan(model, config)
    recipe = make_recipe(config.recipe, config.scheme)
    if config.kv_cache is not None:
        check_cache(model, config.kv_cache, observer_of(config))
    if needs_data(made, recipe, config) and calibration is None:
        tokens = calibration_tokens_of(config, recipe, tokenizer)
        calibration = calibration_batches_of(config, recipe, tokens, tokenizer)
    if has_static_cache(config) and calibration is not None:
        calibration = list(batches_of(calibration))  # they are needed twice
    if streamed is None:
        check_finite(model)
    with unfolded(model, made.schemes):
        statistics, work = _carry_out(
            model, made, recipe, config, calibration, console, streamed, store, see
        )
    quantize_embeddings(model, made.embeddings, made.sharing, see)
    if config.kv_cache is not None:
        _quantize_cache(model, config, calibration, console)
    checkpoint.declare_quantized(model)
    seconds = time.perf_counter() - start
    return QuantizationResult(
        model,
        made,
        config,
        statistics,
        seconds,
        str(recipe),
        () if work is None else tuple(work.notes),
        () if work is None else tuple(work.remedies),
    )


def _carry_out(
    model: nn.Module,
    made: Plan,
    recipe: Recipe,
    config: QuantizationConfig,
    calibration: Iterable[Any] | None,
    console: Console,
    streamed: StreamedModel | None,
    store: Work | None,
    see: See | None,
) -> tuple[dict[str, LayerStatistics], Blockwise | None]:
    """Quantize the linear layers of an unfolded model."""
    statistics: dict[str, LayerStatistics] = {}
    work = None
    if recipe.plain:
        statistics = _calibrate(model, made, config, calibration, console)
        console.stage_name = "quantize"
        quantize = partial(quantize_plainly, recipe)
        bar = console.bar("layer")
        fill_layer = None if streamed is None else streamed.fill_layer
        placed = None
        if store is not None and store.streams:
            placed = _puts_out(model, made.schemes, store)
        quantize_layers(model, made.schemes, statistics, quantize, bar, fill_layer, placed, see)
    else:
        assert calibration is not None
        console.stage_name = f"quantize ({recipe})"
        fill = None if streamed is None else streamed.fill
        work = _quantize_blockwise(
            model, made, recipe, config, calibration, console, fill, store, see
        )
        if streamed is not None:
            for name in work.restored:
                streamed.drop(name)
    if streamed is not None:
        streams = store is not None and store.streams
        streamed.fill_rest(partial(store.put_out, model) if store and streams else None)
    return statistics, work


def _puts_out(model: nn.Module, layers: Iterable[str], store: Work) -> Callable[[str], None]:
    """Told about each layer that is quantized, in order; with the last one of a block, all of the
    block leaves memory: what stayed float in it is part of its mapped file, and would hold that."""
    blocks = [block for names in block_lists(model) for block in names]
    owners = {
        layer: next((b for b in blocks if layer.startswith(f"{b}.")), None) for layer in layers
    }
    last = {block: layer for layer, block in owners.items()}

    def placed(layer: str) -> None:
        block = owners[layer]
        if block is not None and last[block] == layer:
            store.put_out(model, block)

    return placed


def needs_data(made: Plan, recipe: Recipe, config: QuantizationConfig) -> bool:
    blockwise = not recipe.plain and bool(made.schemes)
    return bool(made.static_layers) or blockwise or has_static_cache(config)


def has_static_cache(config: QuantizationConfig) -> bool:
    """Whether the key-value cache has scales from calibration."""
    return config.kv_cache is not None and config.kv_cache.static


def _quantize_cache(
    model: nn.Module,
    config: QuantizationConfig,
    data: Iterable[Any] | None,
    console: Console,
) -> None:
    """Of the model whose layers are quantized: its keys and values are what a cache will see."""
    if not has_static_cache(config):
        quantize_cache(model, config.kv_cache)
        return
    console.stage_name = "calibrate the key-value cache"
    give_back()  # the freed float weights
    steady()
    bar = console.bar("batch")
    observer = observer_of(config)
    quantize_cache(model, config.kv_cache, calibration=data, observer=observer, progress=bar)


def _quantize_blockwise(
    model: nn.Module,
    made: Plan,
    recipe: Recipe,
    config: QuantizationConfig,
    calibration: Iterable[Any],
    console: Console,
    fill: Callable[[str], None] | None,
    store: Work | None,
    see: See | None,
) -> Blockwise:
    """Carry out a recipe that looks at data."""
    observer = observer_of(config)
    seed = 0 if config.calibration is None else config.calibration.seed
    work = Blockwise(model, made.schemes, recipe, observer, seed, fill, store, see)
    work.run(calibration, console.bar("block"))
    share_inputs(model)
    return work


def calibration_section(config: QuantizationConfig, recipe: Recipe) -> CalibrationConfig:
    """The calibration section, for what needs one.

    Raises:
        CalibrationError: there is none.
    """
    if config.calibration is None:
        what = f"scheme {config.scheme} has static activations, which need"
        if not recipe.plain:
            what = f"recipe [{recipe}] needs"
        elif has_static_cache(config):
            what = "kv_cache has static scales, which need"
        raise CalibrationError(
            f"{what} calibration data: "
            "add a section 'calibration:' with 'data: FILE', or pass calibration=batches"
        )
    return config.calibration


def observer_of(config: QuantizationConfig) -> Plugin:
    """That of the calibration section, or its default."""
    section = config.calibration
    return CalibrationConfig(data=["-"]).observer if section is None else section.observer


def calibration_batches_of(
    config: QuantizationConfig, recipe: Recipe, tokens: TokenSet, tokenizer: Any
) -> Iterable[Any]:
    """Batches of the tokens; one sequence at a time, without padding, for what goes blockwise, so
    that its result does not depend on the batch size."""
    if recipe.plain:
        return batches(tokens, calibration_section(config, recipe).batch_size, _pad_id(tokenizer))
    return batches(tokens, 1, _pad_id(tokenizer))


def calibration_tokens_of(config: QuantizationConfig, recipe: Recipe, tokenizer: Any) -> TokenSet:
    section = calibration_section(config, recipe)
    if tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer: pass tokenizer=...")
    return calibration_tokens(section, tokenizer)


def _pad_id(tokenizer: Any) -> int:
    """Any id will do where there is none: padding is masked."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _calibrate(
    model: nn.Module,
    made: Plan,
    config: QuantizationConfig,
    data: Iterable[Any] | None,
    console: Console,
) -> dict[str, LayerStatistics]:
    if not made.static_layers or data is None:
        return {}
    console.stage_name = "calibrate"
    steady()  # activations of whole batches, which would leave a heap with holes
    bar = console.bar("batch")
    return collect(model, made.static_layers, data, observer_of(config), progress=bar)
