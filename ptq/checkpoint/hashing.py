"""SHA-256 of tensors and files."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ptq.checkpoint.manifest import FileEntry


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in C order; copied only if it is not contiguous or not on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_sha256(tensor: Tensor) -> str:
    """Of the tensor's bytes, in hexadecimal."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(bytes=path.stat().st_size, sha256=digest)
