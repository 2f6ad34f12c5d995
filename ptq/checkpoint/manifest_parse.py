"""From JSON to a manifest whose hash and version are right."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ptq.checkpoint.manifest import FORMAT_VERSION, Manifest, canonical_sha256
from ptq.errors import CheckpointError


def parsed_manifest(data: dict[str, Any], path: Path) -> Manifest:
    """The manifest that these JSON values are.

    Args:
        path: of the file that they come from, for the errors.

    Raises:
        CheckpointError: it is of a newer format, damaged or edited.
    """
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path.parent} has checkpoint format {version}, this ptq reads up to "
            f"{FORMAT_VERSION}; upgrade: pip install -U ptq-toolkit"
        )
    if data.get("manifest_sha256") != canonical_sha256(data):
        raise CheckpointError(
            f"{path} is edited or damaged: its content does not have the hash that it "
            "gives; copy it again from where it was written, or quantize again"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path}: {where}: {first['msg']}; if a newer ptq wrote the checkpoint, "
            "upgrade: pip install -U ptq-toolkit"
        ) from None


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
