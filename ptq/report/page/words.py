"""Texts side by side, with what differs marked, and white space that can be seen."""

import difflib
import re

from markupsafe import Markup, escape


def differences(left: str, right: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in parts; a part is marked where the other text has something else."""
    a, b = _words(left), _words(right)
    parts: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for tag, a1, a2, b1, b2 in matcher.get_opcodes():
        if a2 > a1:
            parts[0].append(("".join(a[a1:a2]), tag != "equal"))
        if b2 > b1:
            parts[1].append(("".join(b[b1:b2]), tag != "equal"))
    return parts


def _words(text: str) -> list[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def visible(text: str) -> str:
    """A token with its white space shown."""
    return text.replace("\n", "\u23ce").replace("\t", "\u21e5").replace(" ", "\u00b7") or "\u2205"


def breakable(name: str) -> Markup:
    """A layer's name that a line may break after its dots."""
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))
