"""From JSON to a manifest whose hash and version are right."""

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
