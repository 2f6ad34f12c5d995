"""Observers: what calibration remembers of a layer's input, in fixed memory."""

from ptq.config import Plugin
from ptq.errors import ConfigError
from ptq.observers.base import Codes, Observer
from ptq.observers.entropy import Entropy
from ptq.observers.minmax import MinMax
from ptq.observers.moving_average import MovingAverage
from ptq.observers.mse import MSE
from ptq.observers.percentile import Percentile
from ptq.observers.second_moment import Moments, SecondMoment
from ptq.plugins import check_options, nearest

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
}
"""By the name in the configuration."""

__all__ = ["OBSERVERS", "Codes", "Moments", "Observer", "SecondMoment", "make_observer"]


def make_observer(plugin: Plugin, scheme: Codes, channels: int | None = None) -> Observer:
    """An observer with its options checked.

    Args:
        scheme: that the range is for.
        channels: one range for each of so many channels; None: one for the tensor.

    Raises:
        ConfigError: no such observer or option, or a value that the option cannot take.
    """
    if plugin.name not in OBSERVERS:
        hint = nearest(plugin.name, OBSERVERS, "known observers")
        raise ConfigError(f"unknown observer {plugin.name!r}; {hint}")
    observer = OBSERVERS[plugin.name]
    options = check_options("observer", plugin, observer.Options)
    return observer(channels, options, scheme)
