"""Granularity: which elements of a matrix share one scale."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ptq.errors import ConfigError

GranularityKind = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True)
class Granularity:
    """How a matrix [R, C] is divided into parts that share one scale.

    ========  ============================  =====================
    kind      one scale for                 scale shape of [R, C]
    ========  ============================  =====================
    tensor    the whole matrix              [1, 1]
    channel   each row (output channel)     [R, 1]
    token     each row (of an activation)   [R, 1]
    group     each run of g along a row     [R, C / g]
    ========  ============================  =====================

    >>> Granularity("group", 32).scale_shape((8, 64))
    (8, 2)
    """

    kind: GranularityKind
    group_size: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == "group") != (self.group_size is not None):
            raise ConfigError(
                f"granularity {self.kind!r} with group_size {self.group_size}: "
                "a group size goes with granularity 'group', and only with it"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"group_size must be at least 1, not {self.group_size}")

    def __str__(self) -> str:
        return f"g{self.group_size}" if self.kind == "group" else self.kind

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scale of a matrix of this shape.

        Raises:
            ConfigError: the group size does not divide the row.
        """
        rows, columns = shape
        if self.kind == "tensor":
            return 1, 1
        if self.group_size is None:
            return rows, 1
        if columns % self.group_size:
            raise ConfigError(
                f"group_size {self.group_size} does not divide the input size {columns}; "
                f"choose one of {', '.join(map(str, group_sizes(columns)))}, or per-channel scales"
            )
        return rows, columns // self.group_size

    def split(self, x: Tensor) -> Tensor:
        """View [R, C] as [scale rows, scale columns, elements that share the scale]."""
        rows, columns = self.scale_shape((x.shape[0], x.shape[1]))
        shared = x.numel() if self.kind == "tensor" else x.shape[1] // columns
        return x.reshape(rows, columns, shared)  # not -1, which no rows would make ambiguous


def group_sizes(columns: int) -> list[int]:
    """The group sizes from 8 up that divide a row of this length (the row itself if none does)."""
    return [g for g in range(8, columns + 1) if columns % g == 0] or [columns]
