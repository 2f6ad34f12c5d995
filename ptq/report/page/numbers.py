"""Numbers on the page: each says where in the JSON it comes from, so that it can be checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

ABSENT = "not measured"


@dataclass(frozen=True)
class Numbers:
    """Formats numbers of a report, found by their path such as ``evaluation.kl_mean``."""

    report: dict[str, Any]

    def get(self, path: str) -> Any:
        """The value at a path of keys and indices; None where there is none."""
        value: Any = self.report
        for key in path.split("."):
            if isinstance(value, list):
                value = value[int(key)] if int(key) < len(value) else None
            elif isinstance(value, dict):
                value = value.get(key)
            else:
                return None
        return value

    def __call__(self, path: str, kind: str = "number", digits: int = 2) -> Markup:
        """A ``<data>`` element with the exact value and the path, showing the number rounded.

        Args:
            kind: a key of ``KINDS``.
            digits: after the point (``short``: significant ones).
        """
        value = self.get(path)
        if value is None:
            return Markup("<span class=absent>{}</span>").format(ABSENT)
        return Markup('<data value="{}" data-path="{}">{}</data>').format(
            value, path, KINDS[kind](value, digits)
        )


def as_bytes(value: float, digits: int) -> str:
    """Decimal units, as the files are listed."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:,.{digits}f}\u00a0{unit}"
    return f"{value:,}\u00a0bytes"


def as_short(value: float, digits: int) -> str:
    """A number of any size, without an exponent where it is readable."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{float(f'{value:.{digits}g}'):,}".removesuffix(".0")
    return f"{value:.{digits - 1}e}"


def as_time(seconds: float, digits: int) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:,.{digits}f}\u00a0ms"
    return f"{seconds:,.{digits}f}\u00a0s"


KINDS: dict[str, Callable[[Any, int], str]] = {
    "number": lambda v, d: f"{v:,.{d}f}",
    "count": lambda v, d: f"{v:,}",
    "id": lambda v, d: str(v),
    "short": as_short,
    "percent": lambda v, d: f"{100 * v:.{d}f}\u00a0%",
    "share": lambda v, d: f"{as_short(100 * v, d)}\u00a0%",
    "change": lambda v, d: f"{100 * (v - 1):+.{d}f}\u00a0%",
    "times": lambda v, d: f"{v:.{d}f}\u00d7",
    "bytes": as_bytes,
    "time": as_time,
    "db": lambda v, d: f"{v:.{d}f}\u00a0dB",
    "nats": lambda v, d: f"{as_short(v, d)}\u00a0nats",
}
"""What a number is, and how it is written."""
