"""What to do with a model, by what was measured: the config that ``ptq init`` writes."""

from ptq.advice.choose import DEVICES, GOALS, LOSSES, USES, Choice, Use, Wishes, choose
from ptq.advice.facts import Facts, look_at
from ptq.advice.measured import MEASURED, Measured
from ptq.advice.text import config_text

__all__ = [
    "DEVICES",
    "GOALS",
    "LOSSES",
    "MEASURED",
    "USES",
    "Choice",
    "Facts",
    "Measured",
    "Use",
    "Wishes",
    "choose",
    "config_text",
    "look_at",
]
