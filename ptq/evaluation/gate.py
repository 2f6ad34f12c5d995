"""Conditions on the figures of an evaluation, for other people's continuous integration.

A condition names what must *not* be: ``kl_mean > 0.05`` is violated where the mean divergence is
above 0.05. The grammar is a figure's name, a comparison and a number; nothing is ever executed.
Names are those of the figures' JSON, with dots into its nested parts (``kv_cache.ratio``). An end
of an interval is a figure like any other, and decides what is asked: ``ratio_high > 1.02`` fails
where a ratio above 1.02 *cannot be ruled out*; ``ratio_low > 1.02`` only where it is proved.
"""

import dataclasses
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq.errors import ConfigError, GateError
from ptq.plugins import nearest

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CONDITION = re.compile(rf"\s*([A-Za-z_][\w.-]*)\s*(>=|<=|>|<)\s*({_NUMBER})\s*")

ANY = "*"
"""In a list of names: any name, at this place and below."""


@dataclass(frozen=True)
class Condition:
    """One condition, which is violated where it holds.

    Args:
        text: as it was given.
        figure: dotted name.
        comparison: one of ``>  >=  <  <=``.
        limit: compared with.
    """

    text: str
    figure: str
    comparison: str
    limit: float

    def violation(self, figures: Mapping[str, Any]) -> str | None:
        """The line that says how the figures violate the condition; None where they do not.

        A figure that is not known (null, NaN, or left out) violates every condition on it: a gate
        that cannot be judged is not passed.
        """
        value: Any = figures
        for part in self.figure.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not isinstance(value, int | float) or math.isnan(value):
            return f"{self.text}: {self.figure} is not known"
        if not _COMPARISONS[self.comparison](value, self.limit):
            return None
        return f"{self.text}: {self.figure} is {value:.6g}"


def parse_conditions(texts: Iterable[str], known: Sequence[str]) -> list[Condition]:
    """Check conditions before any work is done.

    Args:
        known: names of the figures that there will be; ``a.*`` for any name below ``a``.

    Raises:
        ConfigError: a text is no condition, or names no known figure.
    """
    return [_parse(text, known) for text in texts]


def _parse(text: str, known: Sequence[str]) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"fail_if {text!r}: expected a figure, one of {'  '.join(_COMPARISONS)}, and a number, "
            "as in 'kl_mean > 0.05'"
        )
    figure, comparison, limit = match.groups()
    below = (name.removesuffix(ANY) for name in known if name.endswith(f".{ANY}"))
    if figure not in known and not figure.startswith(tuple(below)):
        hint = nearest(figure, known, "known figures")
        raise ConfigError(f"fail_if {text!r}: no figure {figure!r}; {hint}")
    return Condition(text.strip(), figure, comparison, float(limit))


def violations(conditions: Iterable[Condition], figures: Mapping[str, Any]) -> list[str]:
    """A line for each violated condition."""
    found = (condition.violation(figures) for condition in conditions)
    return [line for line in found if line is not None]


def require_none(lines: Sequence[str]) -> None:
    """Refuse figures that violate a condition.

    Raises:
        GateError: with all lines.
    """
    if lines:
        raise GateError("\n".join(lines))


def figure_names(result: type) -> list[str]:
    """Names of the figures of a result's class, those of dataclasses within it by dotted names."""
    hints = typing.get_type_hints(result)
    names = []
    for field in dataclasses.fields(result):
        for kind in _alternatives(hints[field.name]):
            if kind in (int, float):
                names.append(field.name)
            elif typing.get_origin(kind) is dict or hasattr(kind, "to_dict"):
                names.append(f"{field.name}.{ANY}")
            elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
                names += [f"{field.name}.{name}" for name in figure_names(kind)]
    return names


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)
