"""What a run will need, from the config and the shapes alone: bytes written, memory, time."""

from ptq.preflight.check import available_bytes, check_memory
from ptq.preflight.facts import Facts, LinearFacts, Source, facts_of
from ptq.preflight.memory import Stage, memory_stages
from ptq.preflight.prediction import Prediction, compared, predict
from ptq.preflight.rates import Rates, clock, measure_rates
from ptq.preflight.size import checkpoint_bytes
from ptq.preflight.time import time_terms

__all__ = [
    "Facts",
    "LinearFacts",
    "Prediction",
    "Rates",
    "Source",
    "Stage",
    "available_bytes",
    "check_memory",
    "checkpoint_bytes",
    "clock",
    "compared",
    "facts_of",
    "measure_rates",
    "memory_stages",
    "predict",
    "time_terms",
]
