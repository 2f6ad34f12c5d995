"""Number formats as values: what a code may be, and the name it has in configs and checkpoints."""

from ptq.formats.integer import IntFormat

FORMATS: dict[str, IntFormat] = {
    fmt.name: fmt
    for fmt in (
        *(IntFormat(bits, signed=True) for bits in range(2, 9)),
        *(IntFormat(bits, signed=False) for bits in range(2, 9)),
    )
}

__all__ = ["FORMATS", "IntFormat"]
