"""JSON files, which may be damaged, or made to do damage.

A key that is there twice means different things to different readers, so it is an error. So is what
is nested deeper, or larger, than any description of a model: parsing it would take the memory.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptq.errors import CheckpointError

MAX_BYTES = 100_000_000
"""Of a JSON text; the limit that safetensors sets to its headers."""
_MAX_VALUES = 10_000_000
_DEPTH = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""What half of a pair is written as; UTF-8 has none."""


def parsed(text: str) -> Any:
    """The JSON value of a text.

    Raises:
        ValueError, RecursionError: it is not JSON, has a key twice in one object, has too many
            values or too many levels, or has half of a surrogate pair in a string.
    """
    if sum(map(text.count, ",[{")) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES:,} values")
    value = json.loads(text, object_pairs_hook=_object)
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} deep")
        level = [i for one in level for i in _inside(one) if isinstance(i, dict | list)]
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name[:80]!r} is there {count} times")
    return made


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} is damaged: no JSON file of a model is that large")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged, it is not JSON: {error}") from None
    return json_object(text, path)


def json_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in a text that comes from the file at ``path``.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        data = parsed(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged, it holds {type(data).__name__}, not an object")
    return data
