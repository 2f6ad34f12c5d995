"""Reading the YAML file and what the command line sets beside it."""

from pathlib import Path
from typing import Any

import yaml

from ptq.config.mistakes import validate
from ptq.config.whole import QuantizationConfig
from ptq.errors import ConfigError


def load_config(
    path: str | Path, overrides: "list[str] | tuple[str, ...]" = ()
) -> QuantizationConfig:
    """Read a YAML file and apply ``key.subkey=value`` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing or is not YAML, a key is unknown, a value has the wrong
            type; the message has the file and the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}; ready ones are in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory, not a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path} holds {found}, not keys and values such as 'scheme: w8a8'")
    if node is not None:
        _refuse_duplicates(node, path)
    for override in overrides:
        _apply_override(raw, override)
    return validate(QuantizationConfig, raw, str(path), node)


def _one_line(error: yaml.YAMLError | ValueError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _refuse_duplicates(node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(child, path)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"{path}, line {line}: key {key.value!r} is given twice")
            seen.add(key.value)
            _refuse_duplicates(child, path)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, as in --set scheme=w8a16")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override!r}: value is not YAML: {_one_line(error)}") from None
    *parents, last = key.split(".")
    target: Any = raw
    for depth, name in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        target = _descend(target, name, where, override)
    if isinstance(target, list):
        target[_index(target, last, key, override)] = value
    else:
        target[last] = value


def _descend(target: Any, name: str, where: str, override: str) -> Any:
    """The container below ``target`` called ``name``; a shorthand string becomes its mapping."""
    shorthand = {"model": "id", "output": "dir", "calibration": "data", "evaluation": "data"}
    if isinstance(target, list):
        return target[_index(target, name, where, override)]
    child = target.get(name)
    if child is None:
        child = target[name] = {}
    elif isinstance(child, str) and where in shorthand:
        child = target[name] = {shorthand[where]: child}
    elif not isinstance(child, dict | list):
        raise ConfigError(f"--set {override!r}: {where} is {child!r}, it has no keys below it")
    return child


def _index(target: list[Any], name: str, where: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(target):
        found = f"an index from 0 to {len(target) - 1}" if target else "items, the list is empty"
        raise ConfigError(f"--set {override!r}: {where}: expected {found}")
    return int(name)
