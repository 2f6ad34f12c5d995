"""Checkpoints: written whole or not at all, and read back bit for bit or not at all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from ptq.checkpoint import compressed_tensors, packed_int32
from ptq.checkpoint.card import CARD, card_of, card_text
from ptq.checkpoint.compare import assert_same
from ptq.checkpoint.convert import CONVERSIONS, convert
from ptq.checkpoint.declare import declare_quantized
from ptq.checkpoint.embedded import embed, metadata_of
from ptq.checkpoint.load import load
from ptq.checkpoint.manifest import Manifest
from ptq.checkpoint.manifest_read import read_manifest
from ptq.checkpoint.native_write import save
from ptq.checkpoint.shards import shard_bytes
from ptq.checkpoint.target import check_target
from ptq.checkpoint.verify import not_covered, verify_bytes, verify_files


@dataclass(frozen=True)
class CheckpointFormat:
    """A format: ``write(model, directory, **options)`` and ``read(directory, **options)``.

    What is written and read back is equal in the sense of :func:`assert_same`.
    """

    write: Callable[..., object]
    read: Callable[..., nn.Module]


CHECKPOINT_FORMATS: dict[str, CheckpointFormat] = {
    "ptq": CheckpointFormat(write=save, read=load),
    "compressed-tensors": CheckpointFormat(
        write=partial(compressed_tensors.write, engine="transformers", scales="keep"),
        read=load,
    ),
    **{
        layout: CheckpointFormat(
            write=partial(packed_int32.write, layout=layout, engine="transformers", scales="keep"),
            read=load,
        )
        for layout in packed_int32.LAYOUTS
    },
}
"""Those of other toolkits refuse schemes that they have no place for (``UnsupportedError``)."""

__all__ = [
    "CARD",
    "CHECKPOINT_FORMATS",
    "CONVERSIONS",
    "CheckpointFormat",
    "Manifest",
    "assert_same",
    "card_of",
    "card_text",
    "check_target",
    "convert",
    "declare_quantized",
    "embed",
    "load",
    "metadata_of",
    "not_covered",
    "read_manifest",
    "save",
    "shard_bytes",
    "verify_bytes",
    "verify_files",
]
