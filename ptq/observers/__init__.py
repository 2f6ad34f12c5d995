"""Observers: what calibration remembers of a layer's input, in fixed memory."""

import difflib

from pydantic import BaseModel, ValidationError

from ptq.config import Plugin
from ptq.errors import ConfigError
from ptq.observers.base import Observer
from ptq.observers.minmax import MinMax, MinMaxOptions
from ptq.observers.moving_average import MovingAverage, MovingAverageOptions
from ptq.observers.percentile import Percentile, PercentileOptions

OBSERVERS: dict[str, tuple[type[Observer], type[BaseModel]]] = {
    "minmax": (MinMax, MinMaxOptions),
    "moving_average": (MovingAverage, MovingAverageOptions),
    "percentile": (Percentile, PercentileOptions),
}
"""Name in the config: the observer and its options."""

__all__ = ["OBSERVERS", "Observer", "make_observer"]


def make_observer(plugin: Plugin, channels: int | None = None) -> Observer:
    """An observer with its options checked.

    Args:
        channels: one range for each of so many channels; None: one for the tensor.

    Raises:
        ConfigError: no such observer or option.
    """
    if plugin.name not in OBSERVERS:
        near = difflib.get_close_matches(plugin.name, OBSERVERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(OBSERVERS)}"
        raise ConfigError(f"unknown observer {plugin.name!r}; {hint}")
    observer, options = OBSERVERS[plugin.name]
    try:
        return observer(channels, options.model_validate(plugin.options))
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, detail["loc"]))
        known = ", ".join(options.model_fields) or "none"
        raise ConfigError(
            f"observer {plugin.name}: option {key!r}: {detail['msg'].lower()}; options: {known}"
        ) from None
