"""Diagnosis: which layers damage a quantized model, by what, and what helps."""

from ptq.diagnosis.job import Request, check_output, run_diagnosis
from ptq.diagnosis.remedies import Remedy
from ptq.diagnosis.result import FILE, Diagnosis, LayerDiagnosis
from ptq.diagnosis.run import diagnose

__all__ = [
    "FILE",
    "Diagnosis",
    "LayerDiagnosis",
    "Remedy",
    "Request",
    "check_output",
    "diagnose",
    "run_diagnosis",
]
