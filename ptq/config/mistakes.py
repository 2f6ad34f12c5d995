"""What pydantic finds, as one line a mistake: the file, the line and the nearest known key."""

import difflib
import types
import typing
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from ptq.config.section import S
from ptq.errors import ConfigError


def make_section(section: type[S], source: str, **values: Any) -> S:
    """A section from keyword arguments of the API.

    Args:
        source: what the arguments belong to, for the error.

    Raises:
        ConfigError: with one line per mistake.
    """
    return validate(section, values, source, None)


def validate(section: type[S], raw: dict[str, Any], source: str, node: yaml.Node | None) -> S:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(detail, section, source, node) for detail in error.errors()]
        raise ConfigError("; ".join(dict.fromkeys(lines))) from None


def _explain(detail: Any, section: type[BaseModel], source: str, node: yaml.Node | None) -> str:
    loc = detail["loc"]
    line = _line_of(node, loc)
    where = f"{source}, line {line}" if line else source
    key = ".".join(str(part) for part in loc)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(section, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}"
    if detail["type"] == "missing":
        return f"{where}: key {key!r} is required"
    message = _WORDS.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    message = message[0].lower() + message[1:]
    if "unknown scheme" in message or "scheme '" in message:
        return f"{where}: {key}: {message}"
    return f"{where}: {key}: {message}, got {detail['input']!r}"


_WORDS = {
    "model_type": "expected a mapping of keys and values",
    "dict_type": "expected a mapping of keys and values",
    "list_type": "expected a list",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must not be blank",
}


def _line_of(node: yaml.Node | None, loc: tuple[Any, ...]) -> int | None:
    """The line, from one, of the deepest part of ``loc`` that the file holds."""
    line: int | None = None
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            match = next(((k, v) for k, v in node.value if k.value == part), None)
            if match is None:
                return line
            line, node = match[0].start_mark.line + 1, match[1]
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _known_keys(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The keys of the section at ``loc``."""
    for part in loc:
        if isinstance(part, int):
            continue
        inner = _section_in(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, Annotated):
        for arg in typing.get_args(annotation):
            found = _section_in(arg)
            if found is not None:
                return found
    return None
