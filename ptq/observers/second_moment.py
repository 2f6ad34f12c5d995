"""The second moment of a layer's input, which error-compensating algorithms need.

Not an ``Observer``: its result is a matrix, not a range.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core import product
from ptq.observers.base import nothing_seen

_CHUNK = 2048  # rows that are multiplied at once, however they arrive
_PANEL = 256  # columns; a symmetric product is made from the diagonal to the right, by panels


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over the rows.

    Args:
        second: x^T x, float32 [K, K].
        cross: (reference - x)^T x, float32 [K, K]; None where it was not asked for.
        rows: number of rows.
    """

    second: Tensor
    cross: Tensor | None
    rows: int


class SecondMoment:
    """Sums x^T x over rows of K features, and with ``cross`` (reference - x)^T x.

    Rows are gathered into chunks of 2048 before they are multiplied, so the sum is the same, bit
    for bit, however the rows are split into batches (on one machine with one number of threads).
    Their order does matter, in the last bits.

    A chunk's product is computed in float32, where rounding adds up over 2048 rows and no more,
    and is added to a float64 sum, whose rounding does not count. (Kahan summation in float32 would
    need as much memory.) On CUDA float32 products must not be allowed TF32; torch's default is so.

    Memory does not grow with the rows: 8 K^2 + 8192 K bytes, twice that with ``cross``; while a
    chunk is multiplied, 9216 K more (with ``cross`` 8192 K + 4 K^2).
    """

    def __init__(self, features: int, *, cross: bool = False) -> None:
        self.features = features
        self.rows = 0  # also those that wait
        self._cross = cross
        self._sums: list[Tensor] = []  # float64 [K, K]: of x, and where asked of the difference
        self._chunks: list[Tensor] = []  # float32 [2048, K]: the same two
        self._finished = False

    def update(self, rows: Tensor, reference: Tensor | None = None) -> None:
        """Take in rows [R, K], floating point, finite, without padding; R may be 0.

        Args:
            reference: [R, K], what the float model has there; with ``cross``, and only then.
        """
        assert not self._finished, "finish() ended this sum"
        assert rows.ndim == 2 and rows.shape[1] == self.features
        assert (reference is not None) == self._cross
        assert reference is None or reference.shape == rows.shape
        if not self._sums:
            self._allocate(rows.device)
        start = 0
        while start < len(rows):
            filled = self.rows % _CHUNK
            count = min(_CHUNK - filled, len(rows) - start)
            into, source = slice(filled, filled + count), slice(start, start + count)
            self._chunks[0][into] = rows[source]
            if reference is not None:
                self._chunks[1][into] = reference[source].float() - rows[source].float()
            self.rows += count
            start += count
            if filled + count == _CHUNK:
                self._multiply(_CHUNK)

    def finish(self) -> Moments:
        """The means; the sums are released, and nothing can be added.

        Raises:
            CalibrationError: no row was seen.
        """
        assert not self._finished, "finish() ended this sum"
        if self.rows == 0:
            raise nothing_seen()
        if self.rows % _CHUNK:
            self._multiply(self.rows % _CHUNK)
        self._finished = True
        self._chunks.clear()
        self._mirror(self._sums[0])
        means = [self._sums.pop(0).div_(self.rows).float() for _ in range(1 + self._cross)]
        return Moments(means[0], means[1] if self._cross else None, self.rows)

    def _mirror(self, total: Tensor) -> None:
        """Below the diagonal nothing was summed: put there what is above."""
        for start in range(0, self.features, _PANEL):
            end = start + _PANEL
            total[end:, start:end] = total[start:end, end:].T
            block = total[start:end, start:end]
            block.copy_(block.triu() + block.triu(1).T)

    def _allocate(self, device: torch.device) -> None:
        kinds, k = 1 + self._cross, self.features
        self._sums = [torch.zeros(k, k, dtype=torch.float64, device=device) for _ in range(kinds)]
        self._chunks = [torch.empty(_CHUNK, k, device=device) for _ in range(kinds)]

    def _multiply(self, count: int) -> None:
        x = self._chunks[0][:count].T.contiguous()
        for start in range(0, self.features, _PANEL):
            panel = x[start : start + _PANEL]
            self._sums[0][start : start + _PANEL, start:] += product(panel, x[start:])
        if self._cross:
            self._sums[1] += product(self._chunks[1][:count].T, x)
