"""A weight's rows as weights of their own, and back; codes and scales stay as they are."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ptq.core.granularity import Granularity
from ptq.core.quantized_weight import QuantizedWeight


def split_rows(weight: QuantizedWeight, count: int) -> list[QuantizedWeight]:
    """The weight [N, K] as ``count`` weights [N / count, K], over the same memory."""
    rows, columns = weight.shape
    size = rows // count
    assert size * count == rows, weight.shape

    def part(tensor: Tensor | None, number: int) -> Tensor | None:
        whole = tensor is None or tensor.shape[0] != rows  # one scale for all rows
        return tensor if whole or tensor is None else tensor[number * size : (number + 1) * size]

    parts = []
    for number in range(count):
        packed, scale = part(weight.packed, number), part(weight.scale, number)
        assert packed is not None and scale is not None
        zero_point = part(weight.zero_point, number)
        parts.append(
            replace(
                weight, packed=packed, scale=scale, zero_point=zero_point, shape=(size, columns)
            )
        )
    return parts


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
