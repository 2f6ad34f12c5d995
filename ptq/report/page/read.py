"""Reading ``report.json`` and what lies beside it, and checking what the page will show."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ptq.checkpoint.target import BESIDE, REPORT
from ptq.errors import CheckpointError
from ptq.report.page.schema import PageData


def read_directory(directory: Path) -> dict[str, Any]:
    """The sections of ``report.json``, with those of its neighbours.

    Raises:
        CheckpointError: there is no report, or a file is not what ptq writes.
    """
    path = directory / REPORT
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {REPORT}; give the output directory of a run "
            "(scripts/quantize_model.py writes it last)"
        )
    sections = _read(path)
    for name in BESIDE:
        beside = directory / name
        if beside.is_file():
            sections[beside.stem] = _read(beside)
    check(sections, str(directory))
    return sections


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; {_REMEDY}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} is damaged: it holds a {type(found).__name__}, not sections; {_REMEDY}"
        )
    return found


_REMEDY = "restore the file, or run again what wrote it"


def check(sections: dict[str, Any], source: str) -> PageData:
    """What the page shows has the right types, and lists that belong together the same length.

    Raises:
        CheckpointError: the first key that has not.
    """
    try:
        data = PageData.model_validate(sections)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"][0].lower() + first["msg"][1:]
        raise CheckpointError(
            f"{source}: the report is damaged: key {key!r}: {message}, "
            f"got {str(first['input'])[:60]!r}; {_REMEDY}"
        ) from None
    for index, window in enumerate(data.tokens.windows if data.tokens else ()):
        if len(window.pieces) != len(window.kl):
            raise CheckpointError(
                f"{source}: the report is damaged: key 'tokens.windows.{index}': "
                f"{len(window.pieces)} pieces of text and {len(window.kl)} divergences; {_REMEDY}"
            )
    return data
