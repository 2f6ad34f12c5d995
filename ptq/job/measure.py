"""Both models measured on the same tokens."""

from torch import nn
from transformers import PreTrainedModel

from ptq import checkpoint
from ptq.calibrate import TokenSet
from ptq.evaluation import (
    Evaluation,
    ReferenceLogits,
    compare,
    pieces,
    race,
    sample,
    tokens_in_text,
)
from ptq.job.state import Job
from ptq.model import cast_parameters, load_model
from ptq.report import inputs_section, record_inputs

_UNITS = {"causal": "window", "encoder": "text", "images": "image"}


def measure_float(job: Job, model: nn.Module, reference: ReferenceLogits) -> None:
    """Keep the float model's logits and its sample; its weights are about to go."""
    if job.held is not None:
        job.console.stage("evaluate float")
        job.held.record(model, job.console.bar(_UNITS[job.kind]))
    elif job.evaluation is not None:
        job.console.stage("evaluate float")
        reference.record(model, job.evaluation.sequences, job.console.bar("window"))
        _record_inputs(job, model, "before")
    _sample(job, model, "float")


def measure_quantized(job: Job, model: nn.Module, reference: ReferenceLogits) -> None:
    """Compare with the float model's logits; generate from the same prompt."""
    if job.held is not None:
        job.console.stage("evaluate quantized")
        found = job.held.compare(model, job.console.bar(_UNITS[job.kind]))
        job.report.sections["evaluation"] = {"kind": job.kind, **found.to_dict()}
        job.console.say(found)
    elif job.evaluation is not None:
        job.console.stage("evaluate quantized")
        bar = job.console.bar("window")
        result = compare(model, job.evaluation, reference, progress=bar)
        job.report.sections["evaluation"] = result.to_dict()
        job.console.say(result)
        _look_closer(job, model, result, job.evaluation)
        _measure_cache(job, model, job.evaluation, reference)
    _sample(job, model, "quantized")
    if isinstance(model, PreTrainedModel):
        whose = job.report.sections["checkpoint"]["identity"]
        job.card = checkpoint.card_text(model, job.config, job.report.sections, identity=whose)


def _record_inputs(job: Job, model: nn.Module, when: str) -> None:
    """What the layers read of the first window."""
    assert job.evaluation is not None
    found = record_inputs(model, job.plan.schemes, job.evaluation.sequences[0])
    job.inputs[when] = found


def _look_closer(job: Job, model: nn.Module, result: Evaluation, data: TokenSet) -> None:
    """Which tokens came out differently, what the layers read, and what it takes of time."""
    assert result.tokens is not None
    job.report.sections["tokens"] = tokens_in_text(result.tokens, data, job.tokenizer)
    _record_inputs(job, model, "after")
    texts = pieces(job.tokenizer, data.sequences[0].tolist())
    job.report.sections["inputs"] = inputs_section(job.inputs["before"], job.inputs["after"], texts)
    if job.config.evaluation is not None and job.config.evaluation.speed:
        job.console.stage("time float against quantized")
        rival = load_model(job.source, bars=False)
        cast_parameters(rival, job.dtype())
        bar = job.console.bar("turn")
        job.report.sections["speed"] = race(rival, model, data.sequences[0], progress=bar)


def _measure_cache(job: Job, model: nn.Module, data: TokenSet, reference: ReferenceLogits) -> None:
    """The same comparison through the quantized cache, and its bytes."""
    if job.config.kv_cache is None:
        return
    job.console.stage("evaluate through the quantized cache")
    bar = job.console.bar("window")
    result = compare(model, data, reference, through_cache=True, progress=bar)
    job.report.sections["kv_cache"] = result.to_dict()
    job.console.say(result)


def _sample(job: Job, model: nn.Module, key: str) -> None:
    """Continue every prompt."""
    section = job.config.generation
    if section is None:
        return
    job.console.stage(f"generate ({key})")
    rows = job.samples.setdefault("samples", [{"prompt": text} for text, _ in job.prompts])
    tokens, seconds = 0, 0.0
    for (text, prompt), row in zip(job.prompts, rows, strict=True):
        made = sample(model, job.tokenizer, prompt, section.max_new_tokens)
        row[key] = made.text
        tokens, seconds = tokens + made.new_tokens, seconds + made.seconds
        job.console.say(f"{text} ...{made.text}")
    job.samples[f"{key}_tokens_per_second"] = tokens / seconds
