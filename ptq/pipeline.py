"""The main job, told in order: config, load, plan, calibrate, quantize, save, verify, evaluate."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ptq import checkpoint
from ptq.blockwise import Blockwise, quantize_plainly
from ptq.calibrate import (
    LayerStatistics,
    TokenSet,
    batches,
    calibration_tokens,
    collect,
    evaluation_windows,
    overlap,
)
from ptq.config import (
    ActivationScheme,
    CalibrationConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OutputConfig,
    Plugin,
    QuantizationConfig,
    Scheme,
    as_config,
    load_config,
    torch_dtype,
)
from ptq.errors import CalibrationError, ConfigError, ModelError
from ptq.evaluation import (
    Condition,
    Evaluation,
    HeldReference,
    Kind,
    ReferenceLogits,
    compare,
    encode_prompt,
    evaluated_as,
    evaluation_data,
    known_figures,
    parse_conditions,
    pieces,
    race,
    require_generation,
    sample,
    tokens_in_text,
    violations,
)
from ptq.kv_cache import check_cache, quantize_cache
from ptq.model import (
    ModelSource,
    StreamedModel,
    block_lists,
    cast_parameters,
    check_finite,
    check_tokens,
    load_image_processor,
    load_model,
    load_model_config,
    load_tokenizer,
    max_positions,
    require_token_ids,
    resolve_device,
    skeleton,
    stream_model,
    unfolded,
)
from ptq.modules import share_inputs
from ptq.observers import make_observer
from ptq.planning import Plan, plan
from ptq.preflight import (
    Facts,
    Prediction,
    Source,
    available_bytes,
    check_memory,
    checkpoint_bytes,
    clock,
    compared,
    facts_of,
    measure_rates,
    predict,
)
from ptq.recipe import Recipe, make_recipe
from ptq.report import (
    Console,
    Report,
    WeightRecorder,
    environment,
    explain,
    inputs_section,
    record_inputs,
    sizes,
)
from ptq.report.page import report_page
from ptq.report.report import memory_bytes, peak_memory_bytes
from ptq.resume import Work, discard, fingerprint, give_back, saving_was_cut_off, steady, work_root
from ptq.swap import See, quantize_embeddings, quantize_layers

_REMEDIES_SHOWN = 5  # the report has all
_UNITS = {"causal": "window", "encoder": "text", "images": "image"}


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
        calibration: batches for static activations and for recipes that look at data: tensors,
            tuples, or mappings of keyword arguments; without it, the configuration's calibration
            section is used, which needs ``tokenizer``.
        console: where progress goes (default: bars on standard error).

    Raises:
        ConfigError, UnsupportedError: the request does not fit the model; nothing was changed.
        CalibrationError: data is needed and there is none, or it cannot be used.
        ModelError: NaN or Inf in a weight; nothing was changed.
    """
    return _quantize(model, as_config(scheme), calibration, tokenizer, console or Console())


def _quantize(
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
        check_cache(model, config.kv_cache)
    if _needs_data(made, recipe) and calibration is None:
        tokens = _calibration_tokens(config, recipe, tokenizer)
        calibration = _calibration_batches(config, recipe, tokens, tokenizer)
    if streamed is None:
        check_finite(model)
    with unfolded(model, made.schemes):
        statistics, work = _carry_out(
            model, made, recipe, config, calibration, console, streamed, store, see
        )
    quantize_embeddings(model, made.embeddings, made.sharing, see)
    if config.kv_cache is not None:
        quantize_cache(model, config.kv_cache)
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


def _needs_data(made: Plan, recipe: Recipe) -> bool:
    return bool(made.static_layers) or (not recipe.plain and bool(made.schemes))


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
    observer = _observer(config)
    seed = 0 if config.calibration is None else config.calibration.seed
    work = Blockwise(model, made.schemes, recipe, observer, seed, fill, store, see)
    work.run(calibration, console.bar("block"))
    share_inputs(model)
    return work


def _section(config: QuantizationConfig, recipe: Recipe) -> CalibrationConfig:
    """The calibration section, for what needs one.

    Raises:
        CalibrationError: there is none.
    """
    if config.calibration is None:
        what = f"scheme {config.scheme} has static activations, which need"
        if not recipe.plain:
            what = f"recipe [{recipe}] needs"
        raise CalibrationError(
            f"{what} calibration data: "
            "add a section 'calibration:' with 'data: FILE', or pass calibration=batches"
        )
    return config.calibration


def _observer(config: QuantizationConfig) -> Plugin:
    section = config.calibration
    return CalibrationConfig(data=["-"]).observer if section is None else section.observer


def _calibration_batches(
    config: QuantizationConfig, recipe: Recipe, tokens: TokenSet, tokenizer: Any
) -> Iterable[Any]:
    """Batches of the tokens; one sequence at a time, without padding, for what goes blockwise, so
    that its result does not depend on the batch size."""
    if recipe.plain:
        return batches(tokens, _section(config, recipe).batch_size, _pad_id(tokenizer))
    return batches(tokens, 1, _pad_id(tokenizer))


def _calibration_tokens(config: QuantizationConfig, recipe: Recipe, tokenizer: Any) -> TokenSet:
    section = _section(config, recipe)
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
    return collect(model, made.static_layers, data, _observer(config), progress=bar)


def run(
    config: QuantizationConfig | str | Path,
    *,
    dry_run: bool = False,
    full_plan: bool = False,
    console: Console | None = None,
) -> Report:
    """Do what a configuration file says, from the float model to a verified checkpoint.

    Args:
        config: the configuration, or the path of its YAML file.
        dry_run: stop after the plan; no weights are loaded.
        full_plan: print a row for each layer.

    Returns:
        The report, whose section ``gate`` says which conditions of ``evaluation.fail_if`` the
        figures violate; :meth:`Report.check_gate` makes that an error. The checkpoint is kept:
        it is whole and verified, and its report is what explains the failure.

    Raises:
        PTQError: bad input, before anything long is done; or a checkpoint that could not be
            written or verified. Nothing half-written stays behind.
    """
    if not isinstance(config, QuantizationConfig):
        config = load_config(config)
    job = _Job(config, console or Console())
    job.make_plan(full_plan)
    if dry_run:
        return job.report
    job.check_output()
    job.read_data()
    with job.opened_work(), ReferenceLogits() as reference:
        model: nn.Module = job.load()
        job.measure_float(model, reference)
        job.quantize(model)
        job.save(model)
        del model
        model = job.read_back()
        job.measure_quantized(model, reference)
        return job.finish()


@dataclass
class _Job:
    """One run: what its stages hand to each other. Each stage is a method, called in order."""

    config: QuantizationConfig
    console: Console
    report: Report = field(init=False)
    start: float = field(default_factory=time.perf_counter, init=False)
    cpu_start: float = field(default_factory=time.process_time, init=False)
    clock_start: float = field(default_factory=clock, init=False)
    source: ModelSource = field(init=False)
    model_config: PretrainedConfig = field(init=False)
    recipe: Recipe = field(init=False)
    plan: Plan = field(init=False)
    facts: Facts = field(init=False)
    forecast: Callable[[Facts], Prediction] = field(init=False)
    work: Work | None = field(default=None, init=False)
    streamed: StreamedModel | None = field(default=None, init=False)
    tokenizer: Any = field(default=None, init=False)
    calibration: TokenSet | None = field(default=None, init=False)
    evaluation: TokenSet | None = field(default=None, init=False)
    prompts: list[tuple[str, Tensor]] = field(default_factory=list, init=False)
    kind: Kind = field(default="causal", init=False)
    held: HeldReference | None = field(default=None, init=False)
    gate: list[Condition] = field(default_factory=list, init=False)
    samples: dict[str, Any] = field(default_factory=dict, init=False)
    weights: WeightRecorder = field(default_factory=WeightRecorder, init=False)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    card: str | None = field(default=None, init=False)
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.report = Report(
            {"config": self.config.model_dump(mode="json"), "environment": environment()}
        )

    def note(self, text: str) -> None:
        """Say what the user may not expect; the report repeats it."""
        self.notes.append(text)
        self.console.say(f"note: {text}")

    @property
    def model_section(self) -> ModelConfig:
        if self.config.model is None:
            raise ConfigError("key 'model' is required: a hub id, a directory or a .gguf file")
        return self.config.model

    @property
    def output(self) -> OutputConfig:
        if self.config.output is None:
            raise ConfigError("key 'output' is required: the directory to create")
        return self.config.output

    def make_plan(self, full: bool) -> None:
        """Decide about every layer from shapes alone, and print it."""
        self.console.stage("plan")
        resolve_device(self.model_section.device)
        self.source = ModelSource.resolve(self.model_section)
        if self.model_section.stream and self.source.gguf_file is not None:
            raise ConfigError("model.stream: GGUF cannot be streamed; set model.stream: false")
        began = time.process_time()
        self.model_config = load_model_config(self.source)
        parse_seconds = time.process_time() - began if self.source.gguf_file else 0.0
        empty = skeleton(self.model_config, trust_remote_code=self.model_section.trust_remote_code)
        self.recipe = make_recipe(self.config.recipe, self.config.scheme)
        self.plan = plan(empty, self.config, dtype=self._dtype())
        self._check_model(empty)
        if self.model_section.stream:
            self._check_streaming()
        self.report.sections["plan"] = self.plan.to_dict()
        self.report.sections["size"] = sizes(self.plan)
        self.console.say(self.plan.table(full))
        if self.config.kv_cache is not None:
            self.console.say(f"key-value cache: {self.config.kv_cache}")
        self._predict(empty, parse_seconds)

    def _predict(self, empty: PreTrainedModel, parse_seconds: float) -> None:
        """Say what the run will need, and whether this machine has it."""
        stored = Source(self.source.gguf_file is not None, parse_seconds)
        facts = facts_of(
            empty,
            self.model_config,
            self.plan,
            self.recipe,
            self.config,
            stored,
            self._float_dtype(),
        )
        limit = 5000 if self.config.output is None else self.config.output.shard_size_mb
        size = checkpoint_bytes(empty, self.plan, self._dtype(), limit * 1_000_000)
        process, began, elapsed = memory_bytes(), clock(), clock() - self.clock_start
        on_cpu = resolve_device(self.model_section.device).type == "cpu"
        rates = measure_rates(facts) if on_cpu else None
        give_back()  # what measuring took
        self.facts = facts
        self.forecast = partial(
            predict,
            checkpoint_bytes=size,
            process=process,
            elapsed=elapsed,
            rates=rates,
            measuring=clock() - began,
        )
        prediction = self.forecast(facts)
        self.report.sections["preflight"] = prediction.to_dict()
        self.console.say(f"\n{prediction}")
        warning = check_memory(facts, prediction.peak, process, available_bytes())
        if warning is not None:
            self.note(warning)

    def _predict_again(self, tokens: TokenSet) -> None:
        """With the text read, whose sequences may be shorter than they could be."""
        lengths = tuple(len(sequence) for sequence in tokens.sequences)
        prediction = self.forecast(replace(self.facts, lengths=lengths))
        self.report.sections["preflight"] = prediction.to_dict()
        self.console.say(prediction)

    def _check_model(self, empty: nn.Module) -> None:
        """Whether a model of this kind can do what the sections ask."""
        if self._calibrates:
            observer = _section(self.config, self.recipe).observer
            make_observer(observer, ActivationScheme(mode="static"))
            require_token_ids(empty)
        elif self.config.calibration is not None:
            self.note(
                "the calibration section is not used: no layer has static activations, "
                f"and the recipe [{self.recipe}] needs no data"
            )
        if self.config.evaluation is not None:
            self.kind = evaluated_as(empty)
            names = [
                name
                for name in known_figures(self.kind)
                if name != "perplexity"
                and (self.config.kv_cache or not name.startswith("kv_cache."))
            ]
            self.gate = parse_conditions(self.config.evaluation.fail_if, names)
        if self.config.generation is not None:
            require_generation(empty)
        if self.config.kv_cache is not None:
            check_cache(empty, self.config.kv_cache)

    def _check_streaming(self) -> None:
        """Whether everything that is asked for can be done one block at a time."""
        sections = [
            key for key in ("evaluation", "generation") if getattr(self.config, key) is not None
        ]
        problem = None
        if sections:
            verb = "needs" if len(sections) == 1 else "need"
            problem = f"{' and '.join(sections)} {verb} the whole float model; remove that"
        elif self.recipe.finishes:
            names = ", ".join(self.recipe.names[-len(self.recipe.finishes) :])
            problem = f"{names} tunes all blocks together; take another recipe than [{self.recipe}]"
        elif self.recipe.plain and self.plan.static_layers:
            problem = (
                f"static activations with recipe [{self.recipe}] are calibrated on the whole float "
                "model; take a recipe that goes block by block, such as [gptq]"
            )
        if problem is not None:
            raise ConfigError(f"model.stream: {problem}, or set model.stream: false")

    @property
    def _calibrates(self) -> bool:
        return _needs_data(self.plan, self.recipe)

    def _dtype(self) -> torch.dtype:
        """dtype of what stays float: the output section's, else the loaded model's."""
        wanted = "auto" if self.config.output is None else self.config.output.dtype
        return self._float_dtype() if wanted == "auto" else torch_dtype(wanted)

    def _float_dtype(self) -> torch.dtype:
        """dtype that the float model is loaded in."""
        if isinstance(self.source.dtype, torch.dtype):
            return self.source.dtype
        stored = self.model_config.dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32

    def check_output(self) -> None:
        """Find out now whether the checkpoint could be written.

        A run that was ended while it saved may have left one, and may replace it, if its work
        turns out to be this run's.
        """
        needed = int(self.plan.bytes_after * 1.02)
        replaces = self.output.overwrite or saving_was_cut_off(self._work_root)
        checkpoint.check_target(self.output.dir, replaces, needed)

    @property
    def _work_root(self) -> Path:
        return work_root(self.output.dir)

    @contextmanager
    def opened_work(self) -> Iterator[None]:
        """Within it, finished blocks are kept beside the output, where the recipe has blocks."""
        streams, blocks = self.model_section.stream, not self.recipe.plain
        if not (streams or (self.output.resume and blocks)) or not self.plan.quantized:
            if discard(self._work_root):
                reason = "output.resume is false" if blocks else "the recipe has no blocks"
                self.note(f"the work of an earlier run in {self._work_root} is discarded: {reason}")
            yield
            return
        wanted = fingerprint(self.config, self.source, self.model_config, self.calibration)
        resume = self.output.resume and blocks
        self.work = Work.open(
            self._work_root, wanted, resume=resume, streams=streams, say=self.note
        )
        self.console.outcome = f"the same command goes on with what is in {self._work_root}"
        try:
            needed = int(self.plan.bytes_after * 1.02) + self._work_bytes(self.work)
            checkpoint.check_target(self.output.dir, self._may_replace, needed)
            yield
        finally:
            self.work.close()

    def _work_bytes(self, work: Work) -> int:
        """What the work will take beyond what is there: every block once, and two times the hidden
        states, old and new, of each model that is followed."""
        states = 0
        if self.calibration is not None:
            width = int(self.model_config.get_text_config().hidden_size)
            itemsize = self._float_dtype().itemsize
            followed = 2 if self.recipe.needs_targets else 1
            states = 2 * followed * self.calibration.tokens * width * itemsize
        there = sum(path.stat().st_size for path in work.root.iterdir() if path.is_file())
        return max(0, self.plan.bytes_after + states - there)

    @property
    def _may_replace(self) -> bool:
        ours = self.work is not None and self.work.saving_was_cut_off
        return self.output.overwrite or ours

    def read_data(self) -> None:
        """Tokenizer and text, so that bad data is found before the weights are loaded."""
        self.console.stage("read data")
        self.tokenizer = load_tokenizer(self.source)
        if self.tokenizer is None:
            if self.kind != "images":
                self.note("the model comes without a tokenizer: none is saved")
            if self._calibrates or (self.config.evaluation and self.kind != "images"):
                raise ModelError(f"model {self.source} has no tokenizer, which its text needs")
        if self._calibrates:
            self.calibration = _calibration_tokens(self.config, self.recipe, self.tokenizer)
            check_tokens(self.model_config, self.calibration.sequences, "calibration text")
            self._predict_again(self.calibration)
        if self.config.evaluation is not None and self.kind != "causal":
            self._read_other(self.config.evaluation)
        elif self.config.evaluation is not None:
            self.evaluation = evaluation_windows(self.config.evaluation, self.tokenizer)
            check_tokens(self.model_config, self.evaluation.sequences, "evaluation text")
            if self.calibration is not None:
                self._note_overlap(self.calibration, self.evaluation)
        if self.config.generation is not None:
            self._read_prompts(self.config.generation)
        named = {"calibration": self.calibration, "evaluation": self.evaluation}
        self.report.sections["data"] = {
            name: {
                "source": list(tokens.source),
                "sha256": tokens.sha256,
                "sequences": len(tokens.sequences),
                "tokens": tokens.tokens,
            }
            for name, tokens in named.items()
            if tokens is not None
        }

    def _read_other(self, section: EvaluationConfig) -> None:
        """Sentences or images, for a model that predicts no next token."""
        images = self.kind == "images"
        processor = load_image_processor(self.source) if images else self.tokenizer
        self.tokenizer = processor  # travels with the checkpoint
        data = evaluation_data(self.kind, section, processor)
        self.held = HeldReference(data)
        if isinstance(data, TokenSet):
            self.evaluation = data
            check_tokens(self.model_config, data.sequences, "evaluation text")

    def _note_overlap(self, calibration: TokenSet, evaluation: TokenSet) -> None:
        shared = overlap(calibration, evaluation)
        if shared > 0:
            self.note(
                f"{shared:.0%} of the evaluation text is in the calibration text as well, so the "
                "figures flatter; evaluate on other text"
            )

    def _read_prompts(self, section: GenerationConfig) -> None:
        limit = max_positions(self.model_config)
        for text in section.all_prompts:
            one = section.model_copy(update={"prompt": text})
            prompt = encode_prompt(one, self.tokenizer)
            check_tokens(self.model_config, list(prompt), "generation.prompt")
            if limit is not None and prompt.shape[1] + section.max_new_tokens > limit:
                raise ConfigError(
                    f"generation: {prompt.shape[1]} tokens of prompt and "
                    f"{section.max_new_tokens} new ones are more than the model's {limit} "
                    "positions; lower max_new_tokens"
                )
            self.prompts.append((text, prompt))

    def load(self) -> PreTrainedModel:
        """The float model; of a streamed one, what is outside its blocks."""
        if self.model_section.stream:
            self.console.stage("open the float model")
            self.streamed = stream_model(self.source, self.note)
            return self.streamed.model
        self.console.stage("load the float model")
        bars = self.console.mode != "quiet"
        model = load_model(self.source, self.model_config, bars=bars, say=self.note)
        check_finite(model)
        return model

    def measure_float(self, model: nn.Module, reference: ReferenceLogits) -> None:
        """Keep the float model's logits and its sample; its weights are about to go."""
        if self.held is not None:
            self.console.stage("evaluate float")
            self.held.record(model, self.console.bar(_UNITS[self.kind]))
        elif self.evaluation is not None:
            self.console.stage("evaluate float")
            reference.record(model, self.evaluation.sequences, self.console.bar("window"))
            self._record_inputs(model, "before")
        self._sample(model, "float")

    def _record_inputs(self, model: nn.Module, when: str) -> None:
        """What the layers read of the first window."""
        assert self.evaluation is not None
        found = record_inputs(model, self.plan.schemes, self.evaluation.sequences[0])
        self.inputs[when] = found

    def quantize(self, model: nn.Module) -> None:
        """Calibrate and quantize in place; what stays float gets the output's dtype."""
        self.console.stage("quantize")
        data = None
        if self.calibration is not None:
            data = _calibration_batches(self.config, self.recipe, self.calibration, self.tokenizer)
        see = self.weights.see
        result = _quantize(
            model, self.config, data, None, self.console, self.streamed, self.work, see
        )
        self.report.sections["weights"] = self.weights.to_dict()
        missing = len(self.plan.schemes) + len(self.plan.embeddings) - len(self.weights.layers)
        if missing:
            self.note(
                f"{missing} layers were finished by an earlier run: the report has no errors of "
                "their weights"
            )
        cast_parameters(model, self._dtype())
        give_back()  # the freed float weights, which the C library keeps otherwise
        self.report.sections["recipe"] = {
            "steps": list(self.recipe.names),
            "seconds": result.seconds,
            "notes": list(result.notes),
            "remedies": list(result.remedies),
        }
        for remedy in result.remedies[:_REMEDIES_SHOWN]:
            self.note(remedy)
        if len(result.remedies) > _REMEDIES_SHOWN:
            self.note(f"{len(result.remedies) - _REMEDIES_SHOWN} more remedies are in report.json")
        self.console.say(f"{len(self.plan.quantized)} layers in {result.seconds:.1f} s")

    def save(self, model: nn.Module) -> None:
        """Write the checkpoint and verify it; it appears whole and right or not at all."""
        self.console.stage("save and verify")
        replaces = self._may_replace
        if self.work is not None:
            self.work.mark_saving()
        verified: list[str] = []
        manifest = checkpoint.save(
            model,
            self.output.dir,
            config=self.config,
            tokenizer=self.tokenizer,
            overwrite=replaces,
            shard_bytes=self.output.shard_size_mb * 1_000_000,
            elsewhere=None if self.work is None else self.work.elsewhere,
            verify=self.output.verify,
            say=verified.append,
            card=False,  # when everything is measured
        )
        self.console.say(f"bit-equal: {verified[0]}")
        if manifest.total_tensor_bytes != self.plan.bytes_after:
            self.note(
                f"the plan predicted {self.plan.bytes_after:,} bytes of tensors, "
                f"the checkpoint has {manifest.total_tensor_bytes:,}"
            )
        self.console.outcome = (
            f"the checkpoint {self.output.dir} is whole, but its report.json is missing"
        )
        weights = sum(p.stat().st_size for p in Path(self.output.dir).glob("*.safetensors"))
        self.report.sections["checkpoint"] = {
            "directory": self.output.dir,
            "predicted_tensor_bytes": self.plan.bytes_after,
            "tensor_bytes": manifest.total_tensor_bytes,
            "weight_file_bytes": weights,
            "manifest_sha256": manifest.manifest_sha256,
            "verify": self.output.verify,
            "bit_equal": verified[0],
        }

    def read_back(self) -> nn.Module:
        """The model of the checkpoint, which is what is measured; a streamed one stays on disk."""
        self.console.stage("read back")
        device = resolve_device(self.model_section.device)
        if self.streamed is not None:
            model: nn.Module = self.streamed.model
            self.report.sections["kernels"] = explain(model, device=device.type).to_dict()
            return model
        model = checkpoint.load(self.output.dir, device=device)
        self.report.sections["kernels"] = explain(model).to_dict()
        return model

    def measure_quantized(self, model: nn.Module, reference: ReferenceLogits) -> None:
        """Compare with the float model's logits; generate from the same prompt."""
        if self.held is not None:
            self.console.stage("evaluate quantized")
            found = self.held.compare(model, self.console.bar(_UNITS[self.kind]))
            self.report.sections["evaluation"] = {"kind": self.kind, **found.to_dict()}
            self.console.say(found)
        elif self.evaluation is not None:
            self.console.stage("evaluate quantized")
            bar = self.console.bar("window")
            result = compare(model, self.evaluation, reference, progress=bar)
            self.report.sections["evaluation"] = result.to_dict()
            self.console.say(result)
            self._look_closer(model, result, self.evaluation)
            self._measure_cache(model, self.evaluation, reference)
        self._sample(model, "quantized")
        if isinstance(model, PreTrainedModel):
            self.card = checkpoint.card_text(model, self.config, self.report.sections)

    def _look_closer(self, model: nn.Module, result: Evaluation, data: TokenSet) -> None:
        """Which tokens came out differently, what the layers read, and what it takes of time."""
        assert result.tokens is not None
        self.report.sections["tokens"] = tokens_in_text(result.tokens, data, self.tokenizer)
        self._record_inputs(model, "after")
        texts = pieces(self.tokenizer, data.sequences[0].tolist())
        self.report.sections["inputs"] = inputs_section(
            self.inputs["before"], self.inputs["after"], texts
        )
        if self.config.evaluation is not None and self.config.evaluation.speed:
            self.console.stage("time float against quantized")
            rival = load_model(self.source, bars=False)
            cast_parameters(rival, self._dtype())
            bar = self.console.bar("turn")
            self.report.sections["speed"] = race(rival, model, data.sequences[0], progress=bar)

    def _measure_cache(self, model: nn.Module, data: TokenSet, reference: ReferenceLogits) -> None:
        """The same comparison through the quantized cache, and its bytes."""
        if self.config.kv_cache is None:
            return
        self.console.stage("evaluate through the quantized cache")
        bar = self.console.bar("window")
        result = compare(model, data, reference, through_cache=True, progress=bar)
        self.report.sections["kv_cache"] = result.to_dict()
        self.console.say(result)

    def _sample(self, model: nn.Module, key: str) -> None:
        """Continue every prompt; ``samples`` has the first one's text at its top as well."""
        section = self.config.generation
        if section is None:
            return
        self.console.stage(f"generate ({key})")
        rows = self.samples.setdefault("samples", [{"prompt": text} for text, _ in self.prompts])
        tokens, seconds = 0, 0.0
        for (text, prompt), row in zip(self.prompts, rows, strict=True):
            made = sample(model, self.tokenizer, prompt, section.max_new_tokens)
            row[key] = made.text
            tokens, seconds = tokens + made.new_tokens, seconds + made.seconds
            self.console.say(f"{text} ...{made.text}")
        self.samples |= rows[0]
        self.samples[f"{key}_tokens_per_second"] = tokens / seconds

    def _judge(self) -> None:
        """Hold the figures against the conditions of ``evaluation.fail_if``."""
        if not self.gate:
            return
        figures = dict(self.report.sections["evaluation"])
        if "kv_cache" in self.report.sections:
            figures["kv_cache"] = self.report.sections["kv_cache"]
        self.report.sections["gate"] = {
            "fail_if": [condition.text for condition in self.gate],
            "violations": violations(self.gate, figures),
        }

    def finish(self) -> Report:
        """Write the report beside the weights, as JSON and as a page, and print its summary."""
        self.console.stage("done")
        self.report.sections["notes"] = self.notes
        if self.samples:
            self.report.sections["generation"] = self.samples
        self.report.sections["resources"] = {
            "seconds": time.perf_counter() - self.start,
            "cpu_seconds": time.process_time() - self.cpu_start,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self.report.sections["preflight"] = compared(
            self.report.sections["preflight"],
            {
                "checkpoint_bytes": self.report.sections["checkpoint"]["weight_file_bytes"],
                **self.report.sections["resources"],
            },
        )
        self._judge()
        self.report.write(self.output.dir)
        if self.card is not None:
            (Path(self.output.dir) / checkpoint.CARD).write_text(self.card, encoding="utf-8")
        page = report_page(self.output.dir)
        if self.work is not None:
            self.work.remove()
        self.console.say(self.report)
        self.console.say(f"page       {page}")
        return self.report
