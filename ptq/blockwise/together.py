"""Layers of a block that are quantized as one weight, because they read the same input."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ptq.algorithms import Algorithm, InputMoments, Outcome
from ptq.config import Scheme
from ptq.core import QuantizedWeight, split_rows

_AT_MOST = 1 << 22  # weights; where there are more, the calls that this saves are not what counts


def together(
    linears: Mapping[str, nn.Linear],
    schemes: Mapping[str, Scheme],
    moments: Mapping[str, InputMoments],
    algorithm: Algorithm,
) -> Iterator[list[str]]:
    """Names of layers, each once, that the algorithm can quantize as the rows of one weight: with
    the same moments, on the way to the same kind of codes."""
    waiting = list(linears)
    while waiting:
        first, *waiting = waiting
        names, size = [first], linears[first].weight.numel()
        scheme, seen = schemes[first].weights, moments.get(first)
        for name in waiting if algorithm.by_rows and scheme.granularity != "tensor" else ():
            alike = seen is not None and moments.get(name) is seen
            more = size + linears[name].weight.numel()
            if alike and schemes[name].weights == scheme and more <= _AT_MOST:
                names.append(name)
                size = more
        waiting = [name for name in waiting if name not in names]
        yield names


def quantize_together(
    linears: list[nn.Linear],
    scheme: Scheme,
    moments: InputMoments | None,
    algorithm: Algorithm,
    options: Any,
) -> list[Outcome]:
    """The outcome for each of some layers; what is noted, is noted for all of them."""
    weights = [linear.weight.detach() for linear in linears]
    if len(weights) == 1:
        return [algorithm.quantize(weights[0], scheme.weights, moments, options)]
    outcome = algorithm.quantize(torch.cat(weights), scheme.weights, moments, options)
    parts = split_rows(outcome.weight, [len(weight) for weight in weights])
    return [replace(outcome, weight=_alone(part)) for part in parts]


def _alone(part: QuantizedWeight) -> QuantizedWeight:
    """In memory of its own."""
    zero_point = None if part.zero_point is None else part.zero_point.clone()
    order = None if part.input_order is None else part.input_order.clone()
    return replace(
        part,
        packed=part.packed.clone(),
        scale=part.scale.clone(),
        zero_point=zero_point,
        input_order=order,
    )
