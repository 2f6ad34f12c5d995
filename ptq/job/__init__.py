"""The stages of a run, in order; each takes the :class:`Job` and leaves in it what others need."""

from ptq.job.data import read_data
from ptq.job.finish import finish
from ptq.job.measure import measure_float, measure_quantized
from ptq.job.planning import make_plan
from ptq.job.produce import load_float_model, quantize_model, read_back, save_checkpoint
from ptq.job.state import Job
from ptq.job.work import check_output, opened_work

__all__ = [
    "Job",
    "check_output",
    "finish",
    "load_float_model",
    "make_plan",
    "measure_float",
    "measure_quantized",
    "opened_work",
    "quantize_model",
    "read_back",
    "read_data",
    "save_checkpoint",
]
