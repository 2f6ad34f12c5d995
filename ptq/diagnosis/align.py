"""Layers whose input was rescaled before they were quantized, seen as the float model has them.

SmoothQuant, AWQ and the signs of a rotation divide what a norm or a layer gives by a scale and
multiply the columns that read it (:mod:`ptq.transforms`). The block gives the same, but its weights
are no longer those of the float model, and would be taken for damaged. The scale is found again:
of a norm from its own weight, between two layers from both of them, where they agree on it.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq.diagnosis.suspect import Suspect
from ptq.modules import QuantLinear
from ptq.sensitivity import InPlace
from ptq.transforms import ScaleGroup, find_groups

_AGREE = 0.1  # of the logarithms of two estimates of a channel's scale
_MOST = 0.8  # of the channels must agree
_FLAT = 0.02  # logarithm, below which a scale is one


@torch.no_grad()
def align(
    in_place: InPlace, quantized: nn.Module, suspects: Mapping[str, Suspect], position: int
) -> tuple[dict[str, Suspect], list[str]]:
    """The layers of a block, with the scales that were found of their inputs and outputs.

    Args:
        suspects: all of the block's, by name.
        position: of the block.

    Returns:
        The layers, and the names of those that cannot be compared: between them, both are mixed by
        a matrix, as a rotation of the heads does.
    """
    assert in_place.chain is not None
    stream = in_place.stream_at(position)
    name = in_place.chain.names[position]
    block, other = in_place.model.get_submodule(name), quantized.get_submodule(name)
    arguments, keywords = stream.calls[0][position].with_hidden(stream.hidden[0])
    found = dict(suspects)
    mixed: list[str] = []
    for group in find_groups(block, arguments, keywords):
        readers = [n for t in group.targets if (n := f"{name}.{t}") in found]
        if group.kind == "norm":
            scale = _of_norm(block, other, group)
            if scale is not None and any(_follows(found[n], scale) for n in readers):
                found |= {n: replace(found[n], columns=scale) for n in readers}
        elif readers and f"{name}.{group.source}" in found:
            mixed += _between(found, f"{name}.{group.source}", readers[0], group)
    return found, mixed


def _between(found: dict[str, Suspect], source: str, reader: str, group: ScaleGroup) -> list[str]:
    """Give both layers the scale that they agree on; names them if they are mixed instead."""
    giver, target = found[source], found[reader]
    rows, columns = _factors(giver, 1), _factors(target, 0)
    channels = group.source_channels(len(columns)).to(columns.device)
    if _is_flat(rows) and _is_flat(columns):
        return []
    unlike = (_unlike(giver), _unlike(target))
    if all(unlike):
        return [source, reader] if group.mixes is not None else []
    if any(unlike):  # only the other one tells
        scale = columns if unlike[0] else 1 / rows[channels]
    else:
        product = columns * rows[channels]  # one where what is divided is multiplied again
        agreed = (product > 0) & (product.abs().log().abs() < _AGREE)
        if agreed.float().mean() < _MOST:
            return []
        scale = torch.where(agreed, columns, torch.ones_like(columns))
    found[reader] = replace(target, columns=scale)
    out = torch.ones_like(rows)
    out[channels] = scale
    found[source] = replace(giver, rows=out)
    return []


def _of_norm(block: nn.Module, other: nn.Module, group: ScaleGroup) -> Tensor | None:
    """What a norm's channels were divided by, float32 [K]; None where that is one."""
    before, after = (m.get_submodule(group.source).weight for m in (block, other))
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    scale = (before.float() + group.offset) / (after.float().to(before.device) + group.offset)
    scale = torch.where(scale.isfinite() & (scale != 0), scale, torch.ones_like(scale))
    return None if _is_flat(scale) else scale


def _factors(suspect: Suspect, dim: int) -> Tensor:
    """The factors of the stored weight's columns (dim 0), or rows (1), that fit the float one best,
    what is known of the input's scale taken off."""
    layer = suspect.layer
    assert isinstance(layer, QuantLinear)
    stored, own = layer.float_weight(torch.float32), suspect.own.float()
    if suspect.columns is not None:
        stored = stored / suspect.columns
    return (stored * own).sum(dim) / own.square().sum(dim).clamp(min=1e-30)


def _follows(suspect: Suspect, scale: Tensor) -> bool:
    """Whether the layer's columns were multiplied by this."""
    agreed = (_factors(suspect, 0) / scale - 1).abs() < 2 * _AGREE
    return bool(agreed.float().mean() >= _MOST)


def _is_flat(scale: Tensor) -> bool:
    near = (scale - 1).abs() < _FLAT
    return bool(near.float().mean() >= _MOST)


def _unlike(suspect: Suspect) -> bool:
    """Whether the stored weight does not look like the float one."""
    stored, own = suspect.layer.float_weight(torch.float32), suspect.own.float()
    if suspect.columns is not None:
        stored = stored / suspect.columns
    return bool(nn.functional.cosine_similarity(stored.flatten(), own.flatten(), dim=0) < 0.3)
