"""From a scheme for each layer to few rules that people can read."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ptq.config import Scheme
from ptq.planning import matches

Schemes = Mapping[str, Scheme | None]


@dataclass(frozen=True)
class WrittenRule:
    """A rule of the configuration, and the layers that have it from this rule.

    Args:
        pattern: a glob, or ``re:`` and a regular expression.
    """

    pattern: str
    scheme: Scheme | None
    layers: tuple[str, ...]


def base_scheme(schemes: Schemes) -> Scheme | None:
    """What most layers get; None if all stay float."""
    counts = Counter(scheme for scheme in schemes.values() if scheme is not None)
    return max(counts, key=lambda scheme: counts[scheme], default=None)


def write_rules(schemes: Schemes, base: Scheme, others: Iterable[str] = ()) -> list[WrittenRule]:
    """Rules that give each layer its scheme, where the configuration's scheme is ``base``.

    For each kind of layer (names that differ in numbers only) at most one rule for what most of
    them get, then one for each other scheme, which lists the numbers. Kinds of one parent that
    are alike in everything share their rules. Later rules win.

    Args:
        others: names of linear layers that no pattern should hit without need.
    """
    rules: list[WrittenRule] = []
    every = [*schemes, *others]
    for names in _kinds(schemes):
        counts = Counter(schemes[name] for name in names)
        most = base if counts[base] == max(counts.values()) else counts.most_common(1)[0][0]
        if most != base:
            members = tuple(n for n in names if schemes[n] == most)
            rules.append(WrittenRule(_pattern_of_all(names, every), most, members))
        for scheme in sorted(counts, key=str):
            if scheme != most:
                members = tuple(n for n in names if schemes[n] == scheme)
                rules.append(WrittenRule(_pattern_of(members), scheme, members))
    return rules


def _kinds(schemes: Schemes) -> Iterator[list[str]]:
    """Names of layers of one kind; kinds of one parent with equal schemes together."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in schemes:
        kinds[_kind(name)].append(name)
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for kind, names in kinds.items():
        numbers = tuple((_numbers(name), schemes[name]) for name in names)
        alike[kind.rpartition(".")[0], numbers].extend(names)
    yield from alike.values()


def _kind(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdecimal())


def _pattern_of_all(names: list[str], every: Iterable[str]) -> str:
    """A glob for the whole kinds if it hits nothing else, else a regular expression."""
    kinds = list(dict.fromkeys(map(_kind, names)))
    if len(kinds) == 1:
        short = f"*.{kinds[0].rpartition('.*.')[2]}" if ".*." in kinds[0] else kinds[0]
        for pattern in (short, kinds[0]):
            if _hits(pattern, every) == set(names):
                return pattern
    listed = _pattern_of(names)
    numbered = re.sub(r"\(\d+(\|\d+)+\)", r"\\d+", listed)
    return numbered if _hits(numbered, every) == set(names) else listed


def _hits(pattern: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if matches(pattern, name)}


def _pattern_of(names: Iterable[str]) -> str:
    """A regular expression for exactly these layers, of kinds whose names end differently only."""
    names = list(names)
    if len(names) == 1:
        return names[0]
    stems = list(dict.fromkeys(_stem(name) for name in names))
    tails = list(dict.fromkeys(name[len(_stem(name)) :] for name in names))
    first = [part.split(".") for part in stems]
    common = 0
    while all(len(p) > common + 1 and p[common] == first[0][common] for p in first):
        common += 1
    head = "".join(f"{re.escape(part)}\\." for part in first[0][:common])
    middle = _either([re.escape(".".join(part[common:])) for part in first])
    shared, ends = _split_tails(tails)
    return f"re:{head}{middle}{re.escape(shared)}{_either([re.escape(end) for end in ends])}"


def _stem(name: str) -> str:
    """The name up to its last number, or up to its last part if it has none."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[-1] + 1] if numbers else parts[:-1])


def _split_tails(tails: list[str]) -> tuple[str, list[str]]:
    """What the tails begin with, up to a dot, and how each goes on."""
    if len(tails) == 1:
        return tails[0], [""]
    parent = {tail.rpartition(".")[0] for tail in tails}
    shared = f"{parent.pop()}." if len(parent) == 1 else ""
    return shared, [tail[len(shared) :] for tail in tails]


def _either(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"
