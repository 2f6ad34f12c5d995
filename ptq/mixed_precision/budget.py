"""Budgets as people say them: "90 MB", "4.5 bits", "1% perplexity", "2 ms", "as fast as w8a8"."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ptq.config import Scheme, preset
from ptq.errors import ConfigError

Kind = Literal["bytes", "bits", "perplexity", "milliseconds"]

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_NUMBER = r"(?:at most )?(?P<value>\d+(?:\.\d+)?|\.\d+)"
_FORMS = (
    (re.compile(rf"{_NUMBER} ?(?P<unit>[kmgt]i?b|b|bytes)", re.I), "bytes"),
    (re.compile(rf"{_NUMBER} ?bits?(?: on average)?", re.I), "bits"),
    (re.compile(rf"{_NUMBER} ?% ?(?:of )?(?:perplexity|ppl)", re.I), "perplexity"),
    (re.compile(rf"{_NUMBER} ?(?:ms|milliseconds?)", re.I), "milliseconds"),
    (re.compile(r"(?:at least )?as fast as (?P<like>\S+)", re.I), "milliseconds"),
    (re.compile(r"(?:at least )?as small as (?P<like>\S+)", re.I), "bytes"),
)


@dataclass(frozen=True)
class Budget:
    """One limit.

    Args:
        kind: ``bytes`` of the checkpoint's tensors; ``bits`` on average, of the tensors of the
            layers that may be quantized; ``perplexity``: rise in percent; ``milliseconds`` that
            the linear layers take together.
        value: the limit; None where it is that of the model with one scheme for all layers.
        like: that scheme; None with value None: of the float model.
        text: as it was given.
    """

    kind: Kind
    value: float | None
    like: Scheme | None
    text: str

    def __str__(self) -> str:
        return self.text


def parse_budgets(given: str | Sequence[str]) -> tuple[Budget, ...]:
    """The limits, which hold together; one of each kind at most.

    Raises:
        ConfigError: one is not understood, not above zero, or given twice.
    """
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise ConfigError(f"no budget is given; {_EXAMPLES}")
    budgets = tuple(parse_budget(text) for text in texts)
    kinds = [budget.kind for budget in budgets]
    for budget in budgets:
        if kinds.count(budget.kind) > 1:
            first, second = (b for b in budgets if b.kind == budget.kind)
            raise ConfigError(
                f"budgets {first.text!r} and {second.text!r} are of one kind; give one"
            )
    return budgets


def parse_budget(text: str) -> Budget:
    """One limit.

    Raises:
        ConfigError: it is not understood, or not above zero.
    """
    for form, kind in _FORMS:
        match = form.fullmatch(" ".join(text.split()))
        if match is not None:
            return _budget(kind, match.groupdict(), text)  # type: ignore[arg-type]
    raise ConfigError(f"budget {text!r} is not understood; {_EXAMPLES}")


def _budget(kind: Kind, parts: dict[str, str], text: str) -> Budget:
    if "like" in parts:
        name = parts["like"]
        try:
            return Budget(kind, None, None if name == "float" else preset(name), text)
        except ValueError as error:
            raise ConfigError(f"budget {text!r}: {error}") from None
    value = float(parts["value"]) * _UNITS.get(parts.get("unit", "B").upper(), 1)
    if value <= 0:
        raise ConfigError(f"budget {text!r}: expected more than zero")
    return Budget(kind, value, None, text)


_EXAMPLES = (
    'give one such as "90 MB", "as small as w4a16-g64", "4.5 bits", "1% perplexity", "2.5 ms", '
    '"as fast as w8a8"'
)
