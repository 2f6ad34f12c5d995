"""Document, and the rows of a table that become documents."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq.errors import CalibrationError

Message = Mapping[str, str]

_COLUMNS = ("text", "messages")


@dataclass(frozen=True)
class Document:
    """Plain text, or the messages of a conversation; exactly one is set."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None

    @property
    def empty(self) -> bool:
        return not self.messages and not (self.text and self.text.strip())


def find_columns(names: Sequence[str], column: str | None, where: str) -> list[str]:
    """Those of ``names`` that hold documents: ``column``, or else text, then messages.

    Raises:
        CalibrationError: there is none.
    """
    wanted = _COLUMNS if column is None else (column,)
    found = [name for name in wanted if name in names]
    if not found:
        raise CalibrationError(
            f"{where}: no column {' or '.join(map(repr, wanted))}; "
            f"there are {', '.join(map(str, names)) or 'none'}; name one with 'column:'"
        )
    return found


def from_rows(rows: Iterable[tuple[str, Any]], column: str | None) -> Iterator[Document]:
    """Documents of rows, each with where it stands; rows whose text is null are left out.

    Raises:
        CalibrationError: a row is not a mapping, has no such column, or holds something else.
    """
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise CalibrationError(
                f"{where}: expected an object with a text, found {type(row).__name__} {row!r:.40}"
            )
        for name in find_columns(list(row), column, where):
            if row[name] is not None:
                yield _document(row[name], f"{where}, column {name!r}")
                break


def _document(value: Any, where: str) -> Document:
    if isinstance(value, str):
        return Document(text=value)
    if isinstance(value, list) and all(_is_message(m) for m in value):
        return Document(messages=tuple(value))
    raise CalibrationError(
        f"{where}: expected a text, or a list of messages with role and content, "
        f"found {type(value).__name__} {value!r:.40}"
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
