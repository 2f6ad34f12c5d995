"""Which layers of a block read its residual stream, and which write to it.

Names and classes decide nothing: a layer that reads what a norm of the stream's width gives reads
the stream (:func:`ptq.transforms.find_groups` proves that nothing else does), another one that
gives as many channels writes to it, and whether that is all is shown by a run of the block on
turned states.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate import BlockCall
from ptq.errors import UnsupportedError
from ptq.transforms.base import ScaleGroup
from ptq.transforms.calls import mapped
from ptq.transforms.groups import find_groups
from ptq.transforms.residual.turn import Turn, turn_columns, turn_outputs

_TOLERANCE = 1e-3  # of what turning the stream changes; computed in float32


@dataclass(frozen=True)
class Ports:
    """Of blocks of one kind; names are relative to the block.

    Args:
        norms: each with its readers.
        writers: linear layers whose outputs are added to the stream.
    """

    norms: tuple[ScaleGroup, ...]
    writers: tuple[str, ...]

    def fold(self, block: nn.Module, turn: Turn) -> None:
        """Let a block do on turned states what it did, in place: norms multiply by one then."""
        for group in self.norms:
            norm = block.get_submodule(group.source)
            assert isinstance(norm.weight, Tensor)
            factor = norm.weight.float() + group.offset
            for name in group.targets:
                turn_columns(_linear(block, name).weight, turn, factor)
            with torch.no_grad():
                norm.weight.fill_(1 - group.offset)
        for name in self.writers:
            turn_outputs(_linear(block, name), turn)


def find_ports(name: str, block: nn.Module, call: BlockCall, hidden: Tensor, turn: Turn) -> Ports:
    """What reads and writes the stream in the block called ``name``, proved on a copy in float32.

    Args:
        call, hidden: how the model calls the block.

    Raises:
        UnsupportedError: the block does not do on turned states what it did.
    """
    twin = copy.deepcopy(block).float()
    call = replace(call, arguments=_in_float(call.arguments), keywords=_in_float(call.keywords))
    x = hidden.float()
    arguments, keywords = call.with_hidden(x)
    groups = find_groups(twin, arguments, keywords)
    norms = tuple(g for g in groups if g.kind == "norm" and _width(twin, g) == turn.rotation.size)
    readers = {target for group in norms for target in group.targets}
    ports = Ports(norms, tuple(_writers(twin, readers, turn.rotation.size)))
    off = _difference(twin, call, x, ports, turn)
    if not off <= _TOLERANCE:
        raise UnsupportedError(
            f"residual_rotation: block {name} ({type(block).__name__}) does not do the same on a "
            f"rotated residual stream (off by {off:.2g}): norms that subtract a mean, norms behind "
            "a layer and routers do not allow it; leave the step out"
        )
    return ports


def _difference(twin: nn.Module, call: BlockCall, x: Tensor, ports: Ports, turn: Turn) -> float:
    """Of what the folded block gives for turned states, relative to what turning changes."""
    wanted, turned = turn(call.run(twin, x)), turn(x)
    ports.fold(twin, turn)
    found = call.run(twin, turned)
    return float((found - wanted).norm() / (wanted - turned).norm())


def _writers(block: nn.Module, readers: set[str], width: int) -> list[str]:
    return [
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width and name not in readers
    ]


def _width(block: nn.Module, group: ScaleGroup) -> int:
    return _linear(block, group.targets[0]).in_features


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _in_float(arguments: Any) -> Any:
    return mapped(arguments, lambda x: x.float() if x.is_floating_point() else x)
