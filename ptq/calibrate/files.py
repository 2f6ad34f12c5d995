"""Documents of one file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptq.calibrate.documents import Document, find_columns, from_rows
from ptq.errors import CalibrationError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


def read_file(path: Path, column: str | None) -> list[Document]:
    """Documents of a .jsonl, .json or .parquet file; any other file is one document of text.

    Raises:
        CalibrationError: it cannot be read, is binary or malformed, or has no text.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        found = _parquet(path, column)
    elif suffix == ".jsonl":
        found = list(from_rows(_json_lines(path), column))
    elif suffix == ".json":
        found = list(from_rows(_json_rows(path), column))
    else:
        found = [Document(text=_read_text(path))]
    found = [document for document in found if not document.empty]
    if not found:
        raise CalibrationError(f"{path} is empty: there is no text in it")
    return found


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    if b"\0" in data:
        raise CalibrationError(f"{path} is a binary file, not text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it"
        ) from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _parse(path, line, number)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(path)
    rows = _parse(path, text, 1) if text.strip() else []
    if not isinstance(rows, list):
        raise CalibrationError(
            f"{path}: expected a list of rows, found {type(rows).__name__}; "
            "one object a line needs the suffix .jsonl"
        )
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise CalibrationError(f"{where}: malformed JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        raise CalibrationError(f"{path}, line {line}: JSON that cannot be read: {error}") from None


def _parquet(path: Path, column: str | None) -> list[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = find_columns(file.schema_arrow.names, column, str(path))
            rows = file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(f"{path} is not a whole Parquet file: {reason}") from None
    named = ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    return list(from_rows(named, column))
