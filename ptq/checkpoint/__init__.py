"""Checkpoints: written whole or not at all, and read back bit for bit or not at all."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ptq.checkpoint.compare import assert_same, assert_same_outputs
from ptq.checkpoint.declare import declare_quantized
from ptq.checkpoint.embedded import embed
from ptq.checkpoint.manifest import Manifest
from ptq.checkpoint.manifest_read import read_manifest
from ptq.checkpoint.native_read import load
from ptq.checkpoint.native_write import save
from ptq.checkpoint.target import check_target
from ptq.checkpoint.verify import verify_files


@dataclass(frozen=True)
class CheckpointFormat:
    """A format: ``write(model, directory, **options)`` and ``read(directory, **options)``.

    What is written and read back is equal in the sense of :func:`assert_same`.
    """

    write: Callable[..., object]
    read: Callable[..., nn.Module]


CHECKPOINT_FORMATS: dict[str, CheckpointFormat] = {
    "ptq": CheckpointFormat(write=save, read=load),
}

__all__ = [
    "CHECKPOINT_FORMATS",
    "CheckpointFormat",
    "Manifest",
    "assert_same",
    "assert_same_outputs",
    "check_target",
    "declare_quantized",
    "embed",
    "load",
    "read_manifest",
    "save",
    "verify_files",
]
