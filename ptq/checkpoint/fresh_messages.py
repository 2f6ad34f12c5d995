"""What a process and the fresh one that it asks say to each other."""

from dataclasses import dataclass, field
from typing import Literal

from ptq.checkpoint.outputs import Outputs

Scope = Literal["model", "layers", "tensors"]
Tuned = dict[str, list[tuple[str, str, list[tuple[int, str]]]]]


@dataclass(frozen=True)
class Request:
    """What to check, and the settings of the asking process on which output bits depend.

    Args:
        scope: ``model``: load it as :func:`ptq.load` does, and run it; ``layers``: build and run
            each quantized layer alone; ``tensors``: read and hash everything, run nothing.
        dtype: of the rows that layers are run on.
        tuned: measured kernels, by layer: device, dtype, and (first row, kernel) pairs.
    """

    directory: str
    scope: Scope
    device: str
    threads: int
    dtype: str
    matmul_precision: str
    attention: str | None
    tuned: Tuned


@dataclass(frozen=True)
class Reply:
    """What was found.

    Args:
        error: what is wrong, in one line; None if nothing is.
        outputs: of the model, or of its layers.
        computed: hashes of the buffers that are not in the files, by name.
    """

    error: str | None = None
    outputs: Outputs = field(default_factory=list)
    computed: dict[str, str] = field(default_factory=dict)
