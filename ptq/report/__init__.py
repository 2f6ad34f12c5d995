"""What is shown and what is written down: progress, the explanation of kernels, the report."""

from ptq.report.activations import inputs_section, record_inputs
from ptq.report.console import Console
from ptq.report.explain import Explanation, explain
from ptq.report.report import Report, environment, peak_memory_bytes
from ptq.report.sizes import sizes
from ptq.report.tuning import Times, TunedLayers, Tuning
from ptq.report.weights import WeightRecorder, block_and_kind

__all__ = [
    "Console",
    "Explanation",
    "Report",
    "Times",
    "TunedLayers",
    "Tuning",
    "WeightRecorder",
    "block_and_kind",
    "environment",
    "explain",
    "inputs_section",
    "peak_memory_bytes",
    "record_inputs",
    "sizes",
]
