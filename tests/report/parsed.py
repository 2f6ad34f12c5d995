"""A page taken apart by Python's own parser."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str]
    text: str = ""  # all of it, in the order of the page
    parents: tuple["Node", ...] = field(default=(), repr=False)

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())

    def within(self, *classes: str) -> bool:
        return any(node.classes & set(classes) for node in (*self.parents, self))


class Page(HTMLParser):
    """``nodes`` in the order of the page; ``texts`` with the node that they are in."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.nodes: list[Node] = []
        self.texts: list[tuple[Node, str]] = []
        self._open: list[Node] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {k: v or "" for k, v in attrs}, parents=tuple(self._open))
        self.nodes.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {k: v or "" for k, v in attrs}, parents=tuple(self._open))
        self.nodes.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for node in self._open:
            node.text += data
        if self._open:
            self.texts.append((self._open[-1], data))

    def all(self, tag: str) -> list[Node]:
        return [node for node in self.nodes if node.tag == tag]


UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1, "%": 0.01, "ms": 1e-3, "s": 1,
         "dB": 1, "nats": 1, "\u00d7": 1, "": 1}  # fmt: skip


def shown(text: str) -> tuple[float, float]:
    """The number that a text shows, and how far rounding may have moved it."""
    match = re.fullmatch(r"([+-]?)([\d,]*\.?\d+)(e[+-]\d+)?\s*(\D*)", text.strip())
    assert match is not None, text
    sign, digits, exponent, unit = match.groups()
    places = len(digits.partition(".")[2])
    scale = UNITS[unit] * float(f"1{exponent or ''}")
    value = float(f"{sign}{digits.replace(',', '')}") * scale
    return value, 0.5000001 * 10.0**-places * scale
