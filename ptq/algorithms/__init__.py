"""Algorithms: a float weight, and what calibration saw of its input, to a QuantizedWeight."""

from ptq.algorithms.base import Algorithm, InputMoments, NoOptions, Outcome
from ptq.algorithms.gptq import GptaqOptions, GptqOptions, gptq, orders_inputs
from ptq.algorithms.hqq import HqqOptions, hqq
from ptq.algorithms.inputs import with_static_input
from ptq.algorithms.rtn import RtnOptions, round_to_nearest, rtn

ALGORITHMS: dict[str, Algorithm] = {
    "rtn": Algorithm(rtn, RtnOptions),
    "gptq": Algorithm(
        gptq, GptqOptions, needs_moments=True, by_rows=True, orders_inputs=orders_inputs
    ),
    "gptaq": Algorithm(
        gptq,
        GptaqOptions,
        needs_moments=True,
        needs_cross=True,
        by_rows=True,
        orders_inputs=orders_inputs,
    ),
    "hqq": Algorithm(hqq, HqqOptions),
}
"""By the name in a recipe."""

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "InputMoments",
    "NoOptions",
    "Outcome",
    "round_to_nearest",
    "rtn",
    "with_static_input",
]
