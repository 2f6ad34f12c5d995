"""What every observer offers."""

from typing import Any, ClassVar, Protocol

from pydantic import BaseModel
from torch import Tensor

from ptq.errors import CalibrationError


class Codes(Protocol):
    """What a range is for: a ``format`` of :data:`ptq.formats.INTEGERS` with or without a zero
    point, as ``ActivationScheme`` and ``KVCacheConfig`` have them."""

    @property
    def format(self) -> str: ...

    @property
    def symmetric(self) -> bool: ...


class Observer(Protocol):
    """Sees rows of activations and says what range to quantize.

    Memory does not grow with the number of rows. ``order_dependent`` says whether the range may
    depend on the order of the rows or on how they are split into batches. ``Options`` is the
    pydantic model, ``extra="forbid"``, that checks the options in the configuration.

    Args:
        channels: one range for each of so many channels; None: one for the tensor.
        options: an instance of ``Options``.
        scheme: that the range is for: how many codes, and whether a zero point moves them.
    """

    order_dependent: ClassVar[bool]
    Options: ClassVar[type[BaseModel]]

    def __init__(self, channels: int | None, options: Any, scheme: Codes) -> None: ...

    def update(self, rows: Tensor) -> None:
        """Take in rows [R, C]: floating point, finite; R may be 0, which changes nothing."""
        ...

    def range(self) -> tuple[Tensor, Tensor]:
        """Low and high, float32: [1] for the tensor, or [C] per channel.

        Raises:
            CalibrationError: no row was seen.
        """
        ...


def extremes(rows: Tensor, channels: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, float32: [1], or [C] per channel; R must not be 0."""
    if channels is None:
        low, high = rows.aminmax()
        return low.float().reshape(1), high.float().reshape(1)
    # aminmax(dim=0) takes ten times as long as both of these on a CPU.
    return rows.amin(0).float(), rows.amax(0).float()


def nothing_seen() -> CalibrationError:
    """The error of an observer that is asked before it saw a row."""
    return CalibrationError(
        "an observer saw no rows: the calibration batches are empty or masked; give more data"
    )
