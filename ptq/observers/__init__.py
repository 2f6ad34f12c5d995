"""Observers: what calibration remembers of a layer's input, in fixed memory."""

import difflib
from typing import Any

from pydantic import ValidationError

from ptq.config import Plugin
from ptq.errors import ConfigError
from ptq.observers.base import Observer
from ptq.observers.entropy import Entropy
from ptq.observers.minmax import MinMax
from ptq.observers.moving_average import MovingAverage
from ptq.observers.mse import MSE
from ptq.observers.percentile import Percentile
from ptq.observers.second_moment import Moments, SecondMoment

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
}
"""By the name in the configuration."""

__all__ = ["OBSERVERS", "Moments", "Observer", "SecondMoment", "make_observer"]


def make_observer(plugin: Plugin, channels: int | None = None) -> Observer:
    """An observer with its options checked.

    Args:
        channels: one range for each of so many channels; None: one for the tensor.

    Raises:
        ConfigError: no such observer or option, or a value that the option cannot take.
    """
    if plugin.name not in OBSERVERS:
        hint = _nearest(plugin.name, list(OBSERVERS), "known observers")
        raise ConfigError(f"unknown observer {plugin.name!r}; {hint}")
    observer = OBSERVERS[plugin.name]
    try:
        options = observer.Options.model_validate(plugin.options)
    except ValidationError as error:
        known = list(observer.Options.model_fields)
        lines = [_explain(detail, known) for detail in error.errors()]
        raise ConfigError(f"observer {plugin.name}: {'; '.join(lines)}") from None
    return observer(channels, options)


def _explain(detail: Any, known: list[str]) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"unknown option {key!r}; {_nearest(key, known, 'options')}"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"option {key!r}: {message}, got {detail['input']!r}"


def _nearest(name: str, known: list[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{what}: {', '.join(known) or 'none'}"
