"""The place of the output, and of what is kept beside it until the run is done."""

from collections.abc import Iterator
from contextlib import contextmanager

from ptq import checkpoint
from ptq.job.state import Job
from ptq.resume import Work, discard, fingerprint, saving_was_cut_off


def check_output(job: Job) -> None:
    """Find out now whether the checkpoint could be written.

    A run that was ended while it saved may have left one, and may replace it, if its work
    turns out to be this run's.
    """
    needed = int(job.tensor_bytes * 1.02)
    replaces = job.output.overwrite or saving_was_cut_off(job.work_root)
    checkpoint.check_target(job.output.dir, replaces, needed)


@contextmanager
def opened_work(job: Job) -> Iterator[None]:
    """Within it, finished blocks are kept beside the output, where the recipe has blocks."""
    streams, blocks = job.model_section.stream, not job.recipe.plain
    if not (streams or (job.output.resume and blocks)) or not job.plan.quantized:
        if discard(job.work_root):
            reason = "output.resume is false" if blocks else "the recipe has no blocks"
            job.note(f"the work of an earlier run in {job.work_root} is discarded: {reason}")
        yield
        return
    wanted = fingerprint(job.config, job.source, job.model_config, job.calibration)
    resume = job.output.resume and blocks
    job.work = Work.open(job.work_root, wanted, resume=resume, streams=streams, say=job.note)
    job.console.outcome = f"the same command goes on with what is in {job.work_root}"
    try:
        needed = int(job.tensor_bytes * 1.02) + _work_bytes(job, job.work)
        checkpoint.check_target(job.output.dir, job.may_replace, needed)
        yield
    finally:
        job.work.close()


def _work_bytes(job: Job, work: Work) -> int:
    """What the work will take beyond what is there: every block once, and two times the hidden
    states, old and new, of each model that is followed."""
    states = 0
    if job.calibration is not None:
        width = int(job.model_config.get_text_config().hidden_size)
        itemsize = job.float_dtype().itemsize
        followed = 2 if job.recipe.needs_targets else 1
        states = 2 * followed * job.calibration.tokens * width * itemsize
    there = sum(path.stat().st_size for path in work.root.iterdir() if path.is_file())
    return max(0, job.tensor_bytes + states - there)
