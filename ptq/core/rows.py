"""A weight's rows as weights of their own, and back; codes and scales stay as they are."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ptq.core.granularity import Granularity
from ptq.core.quantized_weight import QuantizedWeight


def split_rows(weight: QuantizedWeight, sizes: int | Sequence[int]) -> list[QuantizedWeight]:
    """The weight [N, K] as weights of so many rows each, over the same memory.

    Args:
        sizes: rows of each; one number: how many there are, all of the same size.
    """
    rows, columns = weight.shape
    if isinstance(sizes, int):
        sizes = [rows // sizes] * sizes
    assert sum(sizes) == rows, (weight.shape, sizes)

    def parts(tensor: Tensor) -> Sequence[Tensor]:
        whole = tensor.shape[0] != rows  # one scale for all rows
        return [tensor] * len(sizes) if whole else torch.split(tensor, list(sizes))

    packed, scales = parts(weight.packed), parts(weight.scale)
    zero_points: Sequence[Tensor | None] = [None] * len(sizes)
    if weight.zero_point is not None:
        zero_points = parts(weight.zero_point)
    return [
        replace(weight, packed=p, scale=s, zero_point=z, shape=(size, columns))
        for p, s, z, size in zip(packed, scales, zero_points, sizes, strict=True)
    ]


def join_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of the rows of several, which have one format and granularity.

    Raises:
        ValueError: they quantize their inputs in different ways, or each has a scale for all of its
            rows and these are not the same.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for name in ("input_scale", "input_zero_point", "input_order"):
        if not _alike([getattr(part, name) for part in parts]):
            raise ValueError(f"they have different values of {name}")
    scale, zero_point = first.scale, first.zero_point
    if first.granularity == Granularity("tensor"):
        if not _alike([p.scale for p in parts]) or not _alike([p.zero_point for p in parts]):
            raise ValueError("each has a scale of its own for the whole of it")
    else:
        scale = torch.cat([part.scale for part in parts])
        if any(part.zero_point is not None for part in parts):
            zero_point = torch.cat([_zero_point(part) for part in parts])
    return replace(
        first,
        packed=torch.cat([part.packed for part in parts]),
        scale=scale,
        zero_point=zero_point,
        shape=(sum(part.shape[0] for part in parts), first.shape[1]),
    )


def _zero_point(weight: QuantizedWeight) -> Tensor:
    """That of a symmetric weight is zero."""
    if weight.zero_point is None:
        return torch.zeros_like(weight.scale, dtype=torch.int8)
    return weight.zero_point


def _alike(values: Sequence[Tensor | None]) -> bool:
    first, *others = values
    if first is None:
        return all(other is None for other in others)
    return all(other is not None and torch.equal(first, other) for other in others)
