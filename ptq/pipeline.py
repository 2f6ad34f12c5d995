"""The main job, told in order: config, load, plan, calibrate, quantize, save, verify, evaluate."""

from pathlib import Path

from torch import nn

from ptq.config import QuantizationConfig, load_config
from ptq.evaluation import ReferenceLogits
from ptq.job import (
    Job,
    check_output,
    finish,
    load_float_model,
    make_plan,
    measure_float,
    measure_quantized,
    opened_work,
    quantize_model,
    read_back,
    read_data,
    save_checkpoint,
)
from ptq.quantization import QuantizationResult, quantize
from ptq.report import Console, Report

__all__ = ["QuantizationResult", "quantize", "run"]


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
    job = Job(config, console or Console())
    make_plan(job, full_plan)
    if dry_run:
        return job.report
    check_output(job)
    read_data(job)
    with opened_work(job), ReferenceLogits() as reference:
        model: nn.Module = load_float_model(job)
        measure_float(job, model, reference)
        quantize_model(job, model)
        save_checkpoint(job, model)
        del model
        model = read_back(job)
        measure_quantized(job, model, reference)
        return finish(job)
