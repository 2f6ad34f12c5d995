"""From the float model to the checkpoint, and back from the disk."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ptq import checkpoint
from ptq.job.state import Job
from ptq.model import cast_parameters, check_finite, load_model, resolve_device, stream_model
from ptq.quantization import calibration_batches_of, quantize_with
from ptq.report import explain
from ptq.resume import give_back

_REMEDIES_SHOWN = 5  # the report has all


def load_float_model(job: Job) -> PreTrainedModel:
    """The float model; of a streamed one, what is outside its blocks."""
    if job.model_section.stream:
        job.console.stage("open the float model")
        job.streamed = stream_model(job.source, job.note)
        return job.streamed.model
    job.console.stage("load the float model")
    bars = job.console.mode != "quiet"
    model = load_model(job.source, job.model_config, bars=bars, say=job.note)
    check_finite(model)
    return model


def quantize_model(job: Job, model: nn.Module) -> None:
    """Calibrate and quantize in place; what stays float gets the output's dtype."""
    job.console.stage("quantize")
    data = None
    if job.calibration is not None:
        data = calibration_batches_of(job.config, job.recipe, job.calibration, job.tokenizer)
    see = job.weights.see
    result = quantize_with(model, job.config, data, None, job.console, job.streamed, job.work, see)
    job.report.sections["weights"] = job.weights.to_dict()
    missing = len(job.plan.schemes) + len(job.plan.embeddings) - len(job.weights.layers)
    if missing:
        job.note(
            f"{missing} layers were finished by an earlier run: the report has no errors of "
            "their weights"
        )
    cast_parameters(model, job.dtype())
    give_back()  # the freed float weights, which the C library keeps otherwise
    job.report.sections["recipe"] = {
        "steps": list(job.recipe.names),
        "seconds": result.seconds,
        "notes": list(result.notes),
        "remedies": list(result.remedies),
    }
    for remedy in result.remedies[:_REMEDIES_SHOWN]:
        job.note(remedy)
    if len(result.remedies) > _REMEDIES_SHOWN:
        job.note(f"{len(result.remedies) - _REMEDIES_SHOWN} more remedies are in report.json")
    job.console.say(f"{len(job.plan.quantized)} layers in {result.seconds:.1f} s")


def save_checkpoint(job: Job, model: nn.Module) -> None:
    """Write the checkpoint and verify it; it appears whole and right or not at all."""
    job.console.stage("save and verify")
    replaces = job.may_replace
    if job.work is not None:
        job.work.mark_saving()
    verified: list[str] = []
    manifest = checkpoint.save(
        model,
        job.output.dir,
        config=job.config,
        tokenizer=job.tokenizer,
        overwrite=replaces,
        shard_bytes=job.output.shard_size_mb * 1_000_000,
        elsewhere=None if job.work is None else job.work.elsewhere,
        verify=job.output.verify,
        say=verified.append,
        card=False,  # when everything is measured
    )
    job.console.say(f"bit-equal: {verified[0]}")
    if manifest.total_tensor_bytes != job.tensor_bytes:
        job.note(
            f"the plan predicted {job.tensor_bytes:,} bytes of tensors, "
            f"the checkpoint has {manifest.total_tensor_bytes:,}"
        )
    job.console.outcome = (
        f"the checkpoint {job.output.dir} is whole, but its report.json is missing"
    )
    weights = sum(p.stat().st_size for p in Path(job.output.dir).glob("*.safetensors"))
    job.report.sections["checkpoint"] = {
        "directory": job.output.dir,
        "predicted_tensor_bytes": job.tensor_bytes,
        "tensor_bytes": manifest.total_tensor_bytes,
        "weight_file_bytes": weights,
        "manifest_sha256": manifest.manifest_sha256,
        "identity": manifest.identity,
        "verify": job.output.verify,
        "bit_equal": verified[0],
    }


def read_back(job: Job) -> nn.Module:
    """The model of the checkpoint, which is what is measured; a streamed one stays on disk."""
    job.console.stage("read back")
    device = resolve_device(job.model_section.device)
    if job.streamed is not None:
        model: nn.Module = job.streamed.model
        job.report.sections["kernels"] = explain(model, device=device.type).to_dict()
        return model
    model = checkpoint.load(job.output.dir, device=device)
    job.report.sections["kernels"] = explain(model).to_dict()
    return model
