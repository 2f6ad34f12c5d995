"""The report of a finished run."""

import time
from pathlib import Path

from ptq import checkpoint
from ptq.evaluation import violations
from ptq.job.state import Job
from ptq.preflight import compared
from ptq.report import Report
from ptq.report.page import report_page
from ptq.report.report import cpu_seconds, peak_memory_bytes


def _judge(job: Job) -> None:
    """Hold the figures against the conditions of ``evaluation.fail_if``."""
    if not job.gate:
        return
    figures = dict(job.report.sections["evaluation"])
    if "kv_cache" in job.report.sections:
        figures["kv_cache"] = job.report.sections["kv_cache"]
    job.report.sections["gate"] = {
        "fail_if": [condition.text for condition in job.gate],
        "violations": violations(job.gate, figures),
    }


def finish(job: Job) -> Report:
    """Write the report beside the weights, as JSON and as a page, and print its summary."""
    job.console.stage("done")
    job.report.sections["notes"] = job.notes
    if job.samples:
        job.report.sections["generation"] = job.samples
    job.report.sections["resources"] = {
        "seconds": time.perf_counter() - job.start,
        "cpu_seconds": cpu_seconds() - job.cpu_start,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    job.report.sections["preflight"] = compared(
        job.report.sections["preflight"],
        {
            "checkpoint_bytes": job.report.sections["checkpoint"]["weight_file_bytes"],
            **job.report.sections["resources"],
        },
    )
    _judge(job)
    job.report.write(job.output.dir)
    if job.card is not None:
        (Path(job.output.dir) / checkpoint.CARD).write_text(job.card, encoding="utf-8")
    page = report_page(job.output.dir)
    if job.work is not None:
        job.work.remove()
    job.console.say(job.report)
    job.console.say(f"page       {page}")
    return job.report
