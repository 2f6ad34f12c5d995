"""Number formats as values: what a code may be, and the name it has in configs and checkpoints."""

from ptq.formats.floating import FLOAT8, FloatFormat
from ptq.formats.integer import IntFormat

Format = IntFormat | FloatFormat

INTEGERS: dict[str, IntFormat] = {
    fmt.name: fmt
    for fmt in (
        *(IntFormat(bits, signed=True) for bits in range(2, 9)),
        *(IntFormat(bits, signed=False) for bits in range(2, 9)),
    )
}
FORMATS: dict[str, Format] = {**INTEGERS, FLOAT8.name: FLOAT8}

__all__ = ["FLOAT8", "FORMATS", "INTEGERS", "FloatFormat", "Format", "IntFormat"]
