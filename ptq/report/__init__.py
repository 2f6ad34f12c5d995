"""What is shown and what is written down: progress, the explanation of kernels, the report."""

from ptq.report.console import Console
from ptq.report.explain import Explanation, explain
from ptq.report.report import Report, environment, peak_memory_bytes
from ptq.report.tuning import Times, TunedLayers, Tuning

__all__ = [
    "Console",
    "Explanation",
    "Report",
    "Times",
    "TunedLayers",
    "Tuning",
    "environment",
    "explain",
    "peak_memory_bytes",
]
