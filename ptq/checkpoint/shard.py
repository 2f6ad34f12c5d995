"""safetensors files, written and read one tensor at a time.

The format (https://github.com/huggingface/safetensors): eight bytes, the length of the header,
little-endian; the header, JSON; the tensors' bytes without gaps. Written here rather than by the
library because a tensor on a GPU or not contiguous is then copied alone instead of with its whole
shard, is hashed on its way, and a full disk is an ``OSError``; read here because the tensors then
own aligned memory, and the file is not held in memory beside them.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptq.checkpoint.hashing import raw_bytes
from ptq.checkpoint.json_file import MAX_BYTES, parsed
from ptq.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes that a checkpoint can hold, by their name in safetensors."""

HASHES_KEY = "ptq_sha256"
"""Of the tensors' hashes, in the metadata of a weight file."""
Elsewhere = Mapping[str, Callable[[], Tensor]]

_DAMAGE = (
    struct.error,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RecursionError,
)
_ALIGNMENT = 64  # of the data in the file: a cache line, as torch's own memory
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is in its file: ``start`` is the offset of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` to ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def write_shard(
    path: Path,
    tensors: Mapping[str, Tensor],
    values: Elsewhere | None = None,
    *,
    hashed: bool = False,
) -> dict[str, str]:
    """Write a new safetensors file; returns the SHA-256 of each tensor's bytes.

    Wide dtypes come first, and the data starts at a multiple of 64, so that every tensor is
    aligned for readers that map the file.

    Args:
        values: for tensors on the meta device, by key: what reads the values as they are written.
        hashed: put the hashes into the header as well, for readers that get this file only.

    Raises:
        OSError: the file exists or cannot be written.
    """
    order = _order(tensors)
    hashes = dict.fromkeys(order, "0" * 64)
    with path.open("xb") as file:
        file.write(_header(tensors, order, hashes if hashed else None))
        for key in order:
            data = raw_bytes(_with_values(key, tensors[key], values))
            file.write(data)
            hashes[key] = hashlib.sha256(data).hexdigest()
        if hashed:
            file.seek(0)
            file.write(_header(tensors, order, hashes))
    return hashes


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the file that :func:`write_shard` makes of these tensors, which need no values,
    with hashes."""
    order = _order(tensors)
    hashes = dict.fromkeys(order, "0" * 64)
    return len(_header(tensors, order, hashes)) + sum(t.nbytes for t in tensors.values())


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda key: (-tensors[key].itemsize, key))


def _with_values(key: str, tensor: Tensor, values: Elsewhere | None) -> Tensor:
    if not tensor.is_meta or values is None:
        return tensor
    made = values[key]().to(tensor.dtype)
    assert made.shape == tensor.shape, key
    return made


def hashes_text(hashes: Mapping[str, str]) -> str:
    """The hashes of a file's tensors, as its header has them under :data:`HASHES_KEY`."""
    return json.dumps(dict(sorted(hashes.items())), separators=(",", ":"))


def _header(
    tensors: Mapping[str, Tensor], order: list[str], hashes: Mapping[str, str] | None
) -> bytes:
    metadata = {"format": "pt"}
    if hashes is not None:
        metadata[HASHES_KEY] = hashes_text(hashes)
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for key in order:
        tensor = tensors[key]
        end = offset + tensor.nbytes
        header[key] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, cut off, or is not safetensors.
    """
    return read_whole_header(path)[0]


def read_whole_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """:func:`read_header`, and what the header says besides.

    Raises:
        CheckpointError: the file is missing, cut off, or is not safetensors.
    """
    header, start = _whole_header(path)
    metadata: dict[str, str] = header.pop("__metadata__", {})
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"tensor {key} in {path} has the unknown dtype {entry['dtype']}")
    stored = {
        key: Stored(DTYPES[entry["dtype"]], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for key, entry in header.items()
    }
    return dict(sorted(stored.items(), key=lambda item: item[1].start)), metadata


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a file says besides its tensors; nothing if it is not safetensors.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        header, _ = _parsed_header(path)
    except _DAMAGE:
        return {}
    except OSError as error:
        raise CheckpointError(f"shard {path} cannot be read: {error}") from None
    found: dict[str, str] = header.get("__metadata__", {})
    return found


def strange_header(path: Path) -> str | None:
    """What of a file's header is not as a writer leaves it, though it can be read: its spaces, or
    text besides the tensors. None if nothing is.

    Raises:
        CheckpointError: the file is missing, cut off, or is not safetensors.
    """
    header, start = _whole_header(path)
    with path.open("rb") as raw:
        text = raw.read(start)[8:].rstrip(b" ")
    written = (json.dumps(header, separators=(",", ":"), ensure_ascii=a) for a in (True, False))
    if text not in [form.encode() for form in written]:
        return "is not spelled as it was written"
    if header.get("__metadata__", {}).get("format") != "pt":
        return 'does not say {"format": "pt"}'
    return None


def _whole_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file whose length is right, and where its data begins."""
    try:
        return _parsed_header(path)
    except FileNotFoundError:
        raise CheckpointError(f"shard {path} is missing; copy the whole checkpoint again") from None
    except (*_DAMAGE, OSError) as error:
        raise CheckpointError(
            f"shard {path} is not a whole safetensors file ({error}); copy it again"
        ) from None


def _parsed_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        (length,) = struct.unpack("<Q", raw.read(8))
        if length > min(size - 8, MAX_BYTES):
            raise ValueError(f"its header is said to have {length} bytes")
        header = parsed(raw.read(length).decode())
    _check_bounds(header, size - 8 - length)
    return header, 8 + length


def _check_bounds(header: dict[str, Any], size: int) -> None:
    """Whether the tensors of a header fill the bytes after it exactly, one after the other.

    The library's own check maps the file, which takes as many addresses as it has bytes.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: they do not, or it is no header.
    """
    metadata = header.get("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is no text")
    entries = [entry for key, entry in header.items() if key != "__metadata__"]
    end = 0
    for entry in sorted(entries, key=lambda e: (e["data_offsets"][0], e["data_offsets"][1])):
        start, stop = entry["data_offsets"]
        shape, dtype = entry["shape"], DTYPES.get(entry["dtype"])
        if start != end or any(type(n) is not int or n < 0 for n in (start, stop, *shape)):
            raise ValueError(f"a tensor starts at {start}, where {end} was expected")
        if dtype is not None and stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{stop - start} bytes do not hold {shape} of {entry['dtype']}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors have {end} bytes, {size} are there")


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory rather than read into it.

    They stay usable after the file is removed; what is written to them does not reach it.

    Raises:
        CheckpointError: the file is missing, cut off, or is not safetensors.
    """
    header = read_header(path)
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    mapped = {}
    for key, stored in header.items():
        size = stored.nbytes
        raw = torch.empty(0, dtype=torch.uint8).set_(storage, stored.start, (size,))  # type: ignore[call-overload]
        mapped[key] = raw.view(stored.dtype).reshape(stored.shape)
    return mapped


def read_tensors(path: Path, header: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors one after the other into CPU memory of their own.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    try:
        with path.open("rb") as file:
            for key, stored in header.items():
                yield key, read_tensor(file.fileno(), path, key, stored)
    except OSError as error:
        raise CheckpointError(f"shard {path} cannot be read: {error}") from None


def read_tensor(descriptor: int, path: Path, key: str, stored: Stored) -> Tensor:
    """A tensor of the open file, in CPU memory of its own; threads may share the file.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    flat = _allocated(key, stored)
    view, place = raw_bytes(flat), stored.start
    try:
        while view:
            count = os.preadv(descriptor, [view], place)
            if count == 0:
                raise CheckpointError(f"shard {path} is cut off within tensor {key}")
            view, place = view[count:], place + count
    except OSError as error:
        raise CheckpointError(f"shard {path} cannot be read: {error}") from None
    return flat.reshape(stored.shape)


def _allocated(key: str, stored: Stored) -> Tensor:
    size = math.prod(stored.shape)
    try:
        return torch.empty(size, dtype=stored.dtype)
    except RuntimeError:
        size *= stored.dtype.itemsize
        raise CheckpointError(f"tensor {key} of {size:,} bytes does not fit into memory") from None
