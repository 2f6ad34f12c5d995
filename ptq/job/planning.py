"""What a run will do, and what it will need: decided from shapes, before anything long."""

import time
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ptq.calibrate import TokenSet
from ptq.config import ActivationScheme
from ptq.errors import ConfigError
from ptq.evaluation import evaluated_as, known_figures, parse_conditions, require_generation
from ptq.job.state import Job
from ptq.kv_cache import check_cache, expected_scales, hold_scales
from ptq.model import (
    ModelSource,
    load_model_config,
    require_token_ids,
    resolve_device,
    skeleton,
    untie_head,
)
from ptq.observers import make_observer
from ptq.planning import plan
from ptq.preflight import (
    Source,
    available_bytes,
    check_memory,
    checkpoint_bytes,
    clock,
    facts_of,
    measure_rates,
    predict,
)
from ptq.quantization import calibration_section, has_static_cache, observer_of
from ptq.recipe import make_recipe
from ptq.report import sizes
from ptq.report.report import memory_bytes
from ptq.resume import give_back


def make_plan(job: Job, full: bool) -> None:
    """Decide about every layer from shapes alone, and print it."""
    job.console.stage("plan")
    resolve_device(job.model_section.device)
    job.source = ModelSource.resolve(job.model_section)
    if job.model_section.stream and job.source.gguf_file is not None:
        raise ConfigError("model.stream: GGUF cannot be streamed; set model.stream: false")
    began = time.process_time()
    job.model_config = load_model_config(job.source)
    parse_seconds = time.process_time() - began if job.source.gguf_file else 0.0
    empty = skeleton(job.model_config, trust_remote_code=job.model_section.trust_remote_code)
    job.recipe = make_recipe(job.config.recipe, job.config.scheme)
    job.plan = plan(empty, job.config, dtype=job.dtype())
    _check_model(job, empty)
    if job.model_section.stream:
        _check_streaming(job)
    job.report.sections["plan"] = job.plan.to_dict()
    job.report.sections["size"] = sizes(job.plan)
    job.console.say(job.plan.table(full))
    _plan_cache(job, empty)
    _predict(job, empty, parse_seconds)


def _plan_cache(job: Job, empty: PreTrainedModel) -> None:
    """Say how keys and values are kept; static scales become part of the empty model."""
    settings = job.config.kv_cache
    if settings is None:
        return
    layers = expected_scales(empty.config, settings)
    more = ""
    if layers:
        hold_scales(empty, layers)
        job.cache_bytes = sum(b.nbytes for layer in layers.values() for b in layer.buffers())
        more = f"; {job.cache_bytes:,} bytes of scales in the checkpoint, from calibration"
    job.console.say(f"key-value cache: {settings}{more}")


def _predict(job: Job, empty: PreTrainedModel, parse_seconds: float) -> None:
    """Say what the run will need, and whether this machine has it."""
    stored = Source(job.source.gguf_file is not None, parse_seconds)
    facts = facts_of(
        empty, job.model_config, job.plan, job.recipe, job.config, stored, job.float_dtype()
    )
    if job.recipe.unties:
        untie_head(empty)
    limit = 5000 if job.config.output is None else job.config.output.shard_size_mb
    size = checkpoint_bytes(empty, job.plan, job.dtype(), limit * 1_000_000)
    process, began, elapsed = memory_bytes(), clock(), clock() - job.clock_start
    on_cpu = resolve_device(job.model_section.device).type == "cpu"
    rates = measure_rates(facts) if on_cpu else None
    give_back()  # what measuring took
    job.facts = facts
    job.forecast = partial(
        predict,
        checkpoint_bytes=size,
        process=process,
        elapsed=elapsed,
        rates=rates,
        measuring=clock() - began,
        threads=torch.get_num_threads(),
    )
    prediction = job.forecast(facts)
    job.report.sections["preflight"] = prediction.to_dict()
    job.console.say(f"\n{prediction}")
    warning = check_memory(facts, prediction.peak, process, available_bytes())
    if warning is not None:
        job.note(warning)


def predict_again(job: Job, tokens: TokenSet) -> None:
    """With the text read, whose sequences may be shorter than they could be."""
    lengths = tuple(len(sequence) for sequence in tokens.sequences)
    prediction = job.forecast(replace(job.facts, lengths=lengths))
    job.report.sections["preflight"] = prediction.to_dict()
    job.console.say(prediction)


def _check_model(job: Job, empty: nn.Module) -> None:
    """Whether a model of this kind can do what the sections ask."""
    if job.calibrates:
        observer = calibration_section(job.config, job.recipe).observer
        make_observer(observer, ActivationScheme(mode="static"))
        require_token_ids(empty)
    elif job.config.calibration is not None:
        job.note(
            "the calibration section is not used: no layer has static activations, the key-value "
            f"cache has no static scales, and the recipe [{job.recipe}] needs no data"
        )
    if job.config.evaluation is not None:
        job.kind = evaluated_as(empty)
        names = [
            name
            for name in known_figures(job.kind)
            if name != "perplexity" and (job.config.kv_cache or not name.startswith("kv_cache."))
        ]
        job.gate = parse_conditions(job.config.evaluation.fail_if, names)
    if job.config.generation is not None:
        require_generation(empty)
    if job.config.kv_cache is not None:
        check_cache(empty, job.config.kv_cache, observer_of(job.config))


def _check_streaming(job: Job) -> None:
    """Whether everything that is asked for can be done one block at a time."""
    sections = [key for key in ("evaluation", "generation") if getattr(job.config, key) is not None]
    problem = None
    if sections:
        verb = "needs" if len(sections) == 1 else "need"
        problem = f"{' and '.join(sections)} {verb} the whole float model; remove that"
    elif job.recipe.finishes:
        names = ", ".join(job.recipe.names[-len(job.recipe.finishes) :])
        problem = f"{names} tunes all blocks together; take another recipe than [{job.recipe}]"
    elif job.recipe.plain and job.plan.static_layers:
        problem = (
            f"static activations with recipe [{job.recipe}] are calibrated on the whole float "
            "model; take a recipe that goes block by block, such as [gptq]"
        )
    elif has_static_cache(job.config):
        problem = (
            "static scales of the key-value cache are calibrated on the whole quantized model; "
            "choose kv_cache.mode: dynamic"
        )
    if problem is not None:
        raise ConfigError(f"model.stream: {problem}, or set model.stream: false")
