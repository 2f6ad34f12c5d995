"""Documents from files, directories and ``datasets`` ids."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptq.errors import CalibrationError

_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
Message = Mapping[str, str]


@dataclass(frozen=True)
class Document:
    """Plain text, or the messages of a conversation; exactly one is set."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None


def load_documents(
    data: Sequence[str],
    *,
    subset: str | None = None,
    split: str = "train",
    column: str | None = None,
) -> list[Document]:
    """Read documents, in order.

    Args:
        data: files (.txt is one document; .jsonl, .json and .parquet hold rows), directories (of
            such files, or saved by ``datasets``), or ids for ``datasets.load_dataset``.
        subset, split: for ids.
        column: with the text, or with the messages of a conversation (default: ``text`` or
            ``messages``, whichever is there).

    Raises:
        CalibrationError: a source is missing, unreadable, binary or empty.
    """
    documents: list[Document] = []
    for source in data:
        found = _load(source, subset, split, column)
        documents += [d for d in found if d.messages or (d.text and d.text.strip())]
    if not documents:
        raise CalibrationError(f"{', '.join(data)}: there is no text in it")
    return documents


def _load(source: str, subset: str | None, split: str, column: str | None) -> list[Document]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory(path, column)
    if path.is_file():
        return _file(path, column)
    if path.suffix in _SUFFIXES or source.startswith((".", "/", "~")):
        raise CalibrationError(f"no calibration or evaluation file at {path.absolute()}")
    return _hub(source, subset, split, column)


def _file(path: Path, column: str | None) -> list[Document]:
    if path.suffix == ".parquet":
        return _parquet(path, column)
    text = _read_text(path)
    if path.suffix == ".jsonl":
        return list(_documents(_json_lines(path, text), str(path), column))
    if path.suffix == ".json":
        rows = _json(path, text, 1)
        if not isinstance(rows, list):
            raise CalibrationError(f"{path}: expected a list of rows, found {type(rows).__name__}")
        return list(_documents(rows, str(path), column))
    return [Document(text=text)]


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data[: 1 << 20]:
        raise CalibrationError(f"{path} is a binary file, not text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it"
        ) from None


def _json_lines(path: Path, text: str) -> Iterable[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _json(path, line, number)


def _json(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}, line {line + error.lineno - 1}: {error.msg}") from None


def _parquet(path: Path, column: str | None) -> list[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(f"{path} is not a whole Parquet file: {reason}") from None
    return list(_documents(rows, str(path), column))


def _directory(path: Path, column: str | None) -> list[Document]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, column)
    files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if not files:
        raise CalibrationError(f"{path} holds no {', '.join(_SUFFIXES)} file")
    return [document for file in files for document in _file(file, column)]


def _saved(path: Path, column: str | None) -> list[Document]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        raise CalibrationError(
            f"{path} holds several splits; name one: {', '.join(f'{path}/{s}' for s in loaded)}"
        )
    return list(_documents(loaded, str(path), column))


def _hub(source: str, subset: str | None, split: str, column: str | None) -> list[Document]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        rows = datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CalibrationError(
            f"data {source!r} is no file or directory here, and as a datasets id: {reason}"
        ) from None
    return list(_documents(rows, source, column))


def _documents(rows: Iterable[Any], source: str, column: str | None) -> Iterable[Document]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise CalibrationError(
                f"{source}, row {number}: expected an object with a text, found {row!r:.40}"
            )
        yield _document(row, f"{source}, row {number}", column)


def _document(row: Mapping[str, Any], where: str, column: str | None) -> Document:
    names = ("text", "messages") if column is None else (column,)
    name = next((n for n in names if row.get(n) is not None), None)
    if name is None:
        raise CalibrationError(
            f"{where}: no column {' or '.join(map(repr, names))}; "
            f"there are {', '.join(map(str, row))}; name one with 'column:'"
        )
    value = row[name]
    if isinstance(value, str):
        return Document(text=value)
    if isinstance(value, list) and all(_is_message(m) for m in value):
        return Document(messages=tuple(value))
    raise CalibrationError(
        f"{where}, column {name!r}: neither text nor messages with role and content"
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
