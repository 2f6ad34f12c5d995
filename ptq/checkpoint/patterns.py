"""Regular expressions that come out of a checkpoint."""

import regex

from ptq.errors import CheckpointError

_SECONDS = 0.2
"""For one name; an honest expression takes a millionth of that."""


def matches(pattern: str, name: str, source: str) -> bool:
    """Whether a name begins with what the expression describes, as ``re.match`` has it.

    The package ``regex``, which transformers needs as well, can stop: some short expressions take
    longer than the universe has lasted.

    Args:
        source: where the expression is, for the error.

    Raises:
        CheckpointError: it is not one, or takes too long.
    """
    try:
        return regex.match(pattern, name, timeout=_SECONDS) is not None
    except (regex.error, RecursionError, MemoryError, OverflowError, ValueError) as error:
        raise CheckpointError(
            f"{source}: {pattern[:80]!r} is not a regular expression: {error}"
        ) from None
    except TimeoutError:
        raise CheckpointError(
            f"{source}: the regular expression {pattern[:80]!r} takes too long; somebody has made "
            "it so, do not use the checkpoint"
        ) from None
