"""Documents from files, directories and ``datasets`` ids."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptq.calibrate.documents import Document, find_columns, from_rows
from ptq.calibrate.files import SUFFIXES, read_file
from ptq.errors import CalibrationError


def load_documents(
    data: Sequence[str],
    *,
    subset: str | None = None,
    split: str = "train",
    column: str | None = None,
) -> list[Document]:
    """Read documents, in order. Rows without text are left out.

    Args:
        data: files (.jsonl, .json and .parquet hold rows, any other is one document of text),
            directories (of .txt, .jsonl, .json and .parquet files, or saved by ``datasets``), or
            ids for ``datasets.load_dataset``.
        subset: configuration name, for ids.
        split: for ids (slices such as ``train[:1000]`` read no more than that) and for saved
            directories with several splits.
        column: with the text, or with the messages of a conversation (default: ``text`` or
            ``messages``, whichever is there).

    Raises:
        CalibrationError: a source is missing, unreadable, binary, malformed or empty.
    """
    return [document for source in data for document in _load(source, subset, split, column)]


def _load(source: str, subset: str | None, split: str, column: str | None) -> list[Document]:
    name = os.path.expanduser(source)
    if os.path.isdir(name):
        return _directory(Path(name), split, column)
    if os.path.isfile(name):
        return read_file(Path(name), column)
    if source.lower().endswith(SUFFIXES) or source.startswith((".", "/", "~")):
        raise CalibrationError(f"no calibration or evaluation file at {os.path.abspath(name)}")
    return _hub(source, subset, split, column)


def _directory(path: Path, split: str, column: str | None) -> list[Document]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, split, column)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise CalibrationError(f"{path.absolute()} holds no {', '.join(SUFFIXES)} file")
    return [document for file in files for document in read_file(file, column)]


def _saved(path: Path, split: str, column: str | None) -> list[Document]:
    """What ``datasets.save_to_disk`` wrote."""
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, datasets.DatasetDict):
            return _from_dataset(loaded, str(path), column)
        if split in loaded:
            return _from_dataset(loaded[split], f"{path}/{split}", column)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise CalibrationError(
            f"{path} cannot be read as a saved dataset: {_first_line(error)}; save it again"
        ) from None
    raise CalibrationError(
        f"{path} has no split {split!r}; there are {', '.join(loaded)}; name one with 'split:'"
    )


def _hub(source: str, subset: str | None, split: str, column: str | None) -> list[Document]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        loaded = datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
        raise CalibrationError(
            f"data {source[:100]!r} is no file or directory here, and cannot be loaded as a "
            f"datasets id: {_first_line(error)}; check the name, or without a network give a file"
        ) from None
    return _from_dataset(loaded, source, column)


def _from_dataset(loaded: Any, where: str, column: str | None) -> list[Document]:
    # Only the columns in use: others may hold images or sound, which would be decoded.
    rows = loaded.select_columns(find_columns(loaded.column_names, column, where))
    named = ((f"{where}, row {number}", row) for number, row in enumerate(rows, 1))
    found = [document for document in from_rows(named, column) if not document.empty]
    if not found:
        raise CalibrationError(f"{where} is empty: there is no text in it")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
