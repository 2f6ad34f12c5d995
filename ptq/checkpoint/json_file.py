"""JSON files, which may be damaged."""

import json
from pathlib import Path
from typing import Any

from ptq.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        CheckpointError: it cannot be read, or is not JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, it is not JSON: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged, it holds {type(data).__name__}, not an object")
    return data
