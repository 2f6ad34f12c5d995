"""The files of a checkpoint against its manifest: headers, tensors, other files."""

from pathlib import Path

from torch import Tensor

from ptq.checkpoint.hashing import file_entry, tensor_sha256
from ptq.checkpoint.manifest import MANIFEST, Manifest
from ptq.checkpoint.paths import inside
from ptq.checkpoint.shard import Stored, dtype_name, read_header
from ptq.errors import CheckpointError


def checked_header(root: Path, shard: str, manifest: Manifest) -> dict[str, Stored]:
    """The header of a shard, which holds exactly the tensors that the manifest says.

    Raises:
        CheckpointError: the shard is missing or damaged, or a tensor is missing, left over,
            misshapen or mistyped; it is named.
    """
    path = inside(root, shard)
    header = read_header(path)
    entries = manifest.in_shard(shard)
    for key in entries:
        if key not in header:
            raise CheckpointError(f"tensor {key} is missing from {path}; copy the file again")
    for key, stored in header.items():
        entry = entries.get(key)
        if entry is None:
            raise CheckpointError(
                f"{path} holds tensor {key}, which {MANIFEST} does not list; copy the file again"
            )
        if (entry.dtype, entry.shape) != (dtype_name(stored.dtype), stored.shape):
            raise CheckpointError(
                f"tensor {key} is {dtype_name(stored.dtype)} {list(stored.shape)} in {path}, "
                f"but {MANIFEST} says {entry.dtype} {list(entry.shape)}; copy the file again"
            )
    return header


def check_tensor(root: Path, key: str, tensor: Tensor, manifest: Manifest) -> None:
    """The tensor has the bytes that were written.

    Raises:
        CheckpointError: it has not.
    """
    entry = manifest.tensors[key]
    check_hash(root / entry.shard, key, tensor_sha256(tensor), entry.sha256)


def check_hash(path: Path, key: str, found: str, wanted: object) -> None:
    """The hash of a tensor's bytes is that of what was written.

    Raises:
        CheckpointError: it is another.
    """
    if found != wanted:
        raise CheckpointError(
            f"tensor {key} in {path} is damaged: its bytes are not those that were written; "
            "copy the file again"
        )


def check_file(root: Path, name: str, manifest: Manifest) -> None:
    """A file that is not a shard has the bytes that were written.

    Raises:
        CheckpointError: it is missing, edited or damaged.
    """
    path = inside(root, name, nested=True)
    try:
        found = file_entry(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from None
    if found != manifest.files[name]:
        raise CheckpointError(
            f"{path} is edited or damaged: its {found.bytes} bytes are not those that were "
            "written; copy it again"
        )
