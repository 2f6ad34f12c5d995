"""Named plugins: looking one up, and checking its options, with errors that help."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from ptq.config import Plugin
from ptq.errors import ConfigError


def nearest(name: str, known: Iterable[str], what: str) -> str:
    """The nearest known name as a question, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{what}: {', '.join(known) or 'none'}"


def check_options(kind: str, plugin: Plugin, options: type[BaseModel]) -> Any:
    """The plugin's options as its own model.

    Raises:
        ConfigError: an unknown option, or a value that the option cannot take.
    """
    try:
        return options.model_validate(plugin.options)
    except ValidationError as error:
        known = list(options.model_fields)
        lines = [_explain(detail, known) for detail in error.errors()]
        raise ConfigError(f"{kind} {plugin.name}: {'; '.join(lines)}") from None


def _explain(detail: Any, known: list[str]) -> str:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"unknown option {key!r}; {nearest(key, known, 'options')}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"option {key!r}: {message[0].lower()}{message[1:]}, got {detail['input']!r}"
