"""The choice of a kernel: the first of an ordered list that takes the spec."""

from dataclasses import dataclass

from ptq.errors import UnsupportedError
from ptq.kernels.cpu_int4 import Int4Pack
from ptq.kernels.cpu_int8pack import Int8Pack
from ptq.kernels.cpu_int_mm import IntMM
from ptq.kernels.cpu_native import NativeFloat, NativeInt4, NativeInt8
from ptq.kernels.cpu_nibble_groups import UnpackGroups
from ptq.kernels.cpu_onednn import OneDnn, OneDnnTwoDigit, Requantized
from ptq.kernels.cpu_two_digit import TwoDigit
from ptq.kernels.cuda import CudaInt4, CudaIntMM
from ptq.kernels.cuda_fp8 import CudaFloat8
from ptq.kernels.cuda_triton import TritonFloat, TritonInt8
from ptq.kernels.dequantize import DequantizeBlocks
from ptq.kernels.reference import Reference
from ptq.kernels.resident import Resident
from ptq.kernels.spec import Kernel, LinearSpec

KERNELS: tuple[Kernel, ...] = (
    NativeInt8(),
    NativeInt4(),
    NativeFloat(),
    OneDnn(),
    OneDnnTwoDigit(),
    Requantized(),
    UnpackGroups(),
    IntMM(),
    TwoDigit(),
    Int8Pack(),
    Int4Pack(),
    TritonInt8(),
    TritonFloat(),
    CudaIntMM(),
    CudaInt4(),
    CudaFloat8(),
    Resident(),
    DequantizeBlocks(),
    Reference(),
)
"""In order of preference."""

_PROBED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)


def refusal(kernel: Kernel, spec: LinearSpec) -> str | None:
    """Why the kernel cannot serve the spec, or declines it; None if it takes it."""
    return kernel.supports(spec) or kernel.declines(spec)


def select(spec: LinearSpec, kernels: tuple[Kernel, ...] = KERNELS) -> Kernel:
    """The first kernel that supports the spec and does not decline it.

    Raises:
        UnsupportedError: none does; the message has every kernel's reason.
    """
    reasons = []
    for kernel in kernels:
        reason = refusal(kernel, spec)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise UnsupportedError(f"no kernel for {spec}: {'; '.join(reasons)}")


@dataclass(frozen=True)
class RowRange:
    """The kernel that serves M from ``first`` to ``last`` rows (None: any number above)."""

    first: int
    last: int | None
    kernel: str
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        if self.last is None:
            return f"M>={self.first}: {self.kernel}"
        rows = f"M={self.first}" if self.first == self.last else f"M={self.first}-{self.last}"
        return f"{rows}: {self.kernel}"


def row_ranges(spec: LinearSpec, kernels: tuple[Kernel, ...] = KERNELS) -> list[RowRange]:
    """Which kernel serves which number of rows, and why the ones before it did not."""
    choices = [(m, select(spec.with_rows(m), kernels)) for m in _PROBED_ROWS]
    starts = [0] + [i for i in range(1, len(choices)) if choices[i][1] != choices[i - 1][1]]
    ranges = []
    for position, start in enumerate(starts):
        end = starts[position + 1] if position + 1 < len(starts) else None
        first = (
            1 if start == 0 else _first_row(spec, choices[start - 1][0], choices[start], kernels)
        )
        last = None
        if end is not None:
            last = _first_row(spec, choices[end - 1][0], choices[end], kernels) - 1
        ranges.append(
            RowRange(first, last, choices[start][1].name, _refusals(spec.with_rows(first), kernels))
        )
    return ranges


def _first_row(
    spec: LinearSpec, below: int, choice: tuple[int, Kernel], kernels: tuple[Kernel, ...]
) -> int:
    """The smallest M above ``below`` that the chosen kernel serves."""
    above, kernel = choice
    while above - below > 1:
        middle = (above + below) // 2
        if select(spec.with_rows(middle), kernels) == kernel:
            above = middle
        else:
            below = middle
    return above


def _refusals(spec: LinearSpec, kernels: tuple[Kernel, ...]) -> tuple[tuple[str, str], ...]:
    refusals = []
    for kernel in kernels:
        reason = refusal(kernel, spec)
        if reason is None:
            break
        refusals.append((kernel.name, reason))
    return tuple(refusals)
