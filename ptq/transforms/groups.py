"""Which layers of a block can share a scale: read from a run of the block, and checked by another.

No class or attribute name decides. A name or a shape only makes a candidate; what makes it a group
is that the block's output stays the same when the candidate is scaled. So a norm that a router or a
residual reads as well, an activation function that is not homogeneous, and normalized values
all drop out by themselves.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ptq.transforms.base import ScaleGroup
from ptq.transforms.calls import first_sequence
from ptq.transforms.probe import Flow, Probe, same_tensor


@torch.no_grad()
def find_groups(
    block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> list[ScaleGroup]:
    """The scaling groups of a block: those of norms, then those of linear layers.

    Runs the block, in eval mode, a few times on the first sequence of a real input, and a few
    times more for each candidate. Its weights are afterwards what they were, bit for bit.

    Args:
        arguments, keywords: a call of the block.
    """
    training = [module for module in block.modules() if module.training]
    block.eval()
    try:
        return _find(Probe(block, *first_sequence(arguments, keywords)))
    finally:
        for module in training:
            module.training = True


def _find(probe: Probe) -> list[ScaleGroup]:
    block, flow = probe.block, probe.watch()
    linears = {
        name: module
        for name in flow.reads
        if type(module := block.get_submodule(name)) is nn.Linear
        and "weight" in module._parameters
        and module.weight.is_floating_point()
    }
    groups: list[ScaleGroup] = []
    read_norms: set[str] = set()
    for name in flow.gives:
        targets = _norm_targets(block.get_submodule(name), flow.gives[name], linears, flow)
        read_norms.update(targets)
        offsets = (0, 1) if targets else ()
        made = (ScaleGroup(name, targets, "norm", offset) for offset in offsets)
        groups += _first(probe, made)
    for name in linears:
        if name not in read_norms:
            found = _first(probe, _pairs(block, name, linears, flow))
            groups += [_with_heads(probe, group, linears) for group in found]
    place = {name: index for index, name in enumerate(flow.reads)}
    return sorted(groups, key=lambda g: (g.kind != "norm", place[g.targets[0]]))


def _first(probe: Probe, candidates: Iterator[ScaleGroup]) -> list[ScaleGroup]:
    """The first candidate that holds, so that no layer is a target twice."""
    held = next((group for group in candidates if probe.preserves(group)), None)
    return [] if held is None else [held]


def _with_heads(probe: Probe, group: ScaleGroup, linears: dict[str, nn.Linear]) -> ScaleGroup:
    """The group, and whether the channels of its heads can be mixed."""
    if group.kind != "heads":
        return group
    rows = linears[group.source].out_features
    dims = _head_dims(probe.block, group.source, group.targets[0])
    if group.head_dim is not None:
        dims = [group.head_dim]
    mixed = next((d for d in dims if rows % d == 0 and probe.mixes(group, d)), None)
    return replace(group, mixes=mixed)


def _norm_targets(
    module: nn.Module, given: Tensor, linears: dict[str, nn.Linear], flow: Flow
) -> tuple[str, ...]:
    """The linear layers that read what a module with a weight per channel gives."""
    weight = module._parameters.get("weight")
    if weight is None or weight.shape != given.shape[-1:]:
        return ()
    return tuple(name for name in linears if same_tensor(flow.reads[name], given))


def _pairs(
    block: nn.Module, target: str, linears: dict[str, nn.Linear], flow: Flow
) -> Iterator[ScaleGroup]:
    """Candidates with this target: earlier layers of the same module, the last one first."""
    order = list(linears)
    columns = linears[target].in_features
    for source in reversed(order[: order.index(target)]):
        rows = linears[source].out_features
        if columns % rows or not _near(source, target, order):
            continue
        if same_tensor(flow.reads[source], flow.reads[target]):
            continue
        dims = _head_dims(block, source, target)
        kind: Literal["linear", "heads"] = "heads" if dims else "linear"
        if rows == columns:
            yield ScaleGroup(source, (target,), kind)
        else:
            for dim in (d for d in dims if rows % d == 0):
                yield ScaleGroup(source, (target,), kind, head_dim=dim, repeats=columns // rows)


def _near(source: str, target: str, linears: list[str]) -> bool:
    """In the same module; or in a neighbouring one, where the target is alone in its own."""
    own = target.rpartition(".")[0]
    if source.rpartition(".")[0] == own:
        return True
    alone = sum(name.rpartition(".")[0] == own for name in linears) == 1
    return alone and bool(own) and _grandparent(source) == _grandparent(target)


def _grandparent(name: str) -> str | None:
    parent = name.rpartition(".")[0]
    return parent.rpartition(".")[0] if parent else None


def _head_dims(block: nn.Module, source: str, target: str) -> list[int]:
    """Sizes of a head that the modules around two layers mention."""
    found: list[int] = []
    for name in (source, target):
        parent = block.get_submodule(name.rpartition(".")[0])
        for attribute in ("head_dim", "attention_head_size", "head_size", "d_kv"):
            value = getattr(parent, attribute, None)
            if isinstance(value, int) and value > 0 and value not in found:
                found.append(value)
    return found
