"""JSON files, which may be damaged."""

import json
from pathlib import Path
from typing import Any

from ptq.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
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
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged, it holds {type(data).__name__}, not an object")
    return data
