"""Which layers a rule names."""

import fnmatch
import re


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's pattern (a glob, or ``re:`` and a regular expression) names the layer."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)
