"""Chains: groups of linear layers that share layers, and the scales that equalize their ranges."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.transforms.base import LARGEST_SCALE, ScaleGroup


def chains_of(groups: Sequence[ScaleGroup]) -> list[list[ScaleGroup]]:
    """The groups, those that share a layer together."""
    chains: list[list[ScaleGroup]] = []
    for group in groups:
        own = {group.source, *group.targets}
        joined = [c for c in chains if any(own & {g.source, *g.targets} for g in c)]
        chains = [c for c in chains if c not in joined]
        chains.append([*(g for c in joined for g in c), group])
    return chains


@dataclass(eq=False)
class Chain:
    """Groups of linear layers that share layers, and the scale of each: float32 [K]."""

    block: nn.Module
    groups: list[ScaleGroup]
    scales: dict[ScaleGroup, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.scales = {
            group: torch.ones(self.weight(group.targets[0]).shape[1]) for group in self.groups
        }

    def weight(self, name: str) -> Tensor:
        """[N, K], as it is in the block."""
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def layers(self) -> list[str]:
        return list(dict.fromkeys(n for g in self.groups for n in (g.source, *g.targets)))

    def rows_and_columns(self, name: str) -> tuple[Tensor, Tensor]:
        """What a layer's rows are divided by, and its columns multiplied by: [N] and [K]."""
        weight = self.weight(name)
        out, into = torch.ones(weight.shape[0]), torch.ones(weight.shape[1])
        for group, s in self.scales.items():
            if name in group.targets:
                into = s
            if name == group.source:
                out[group.source_channels(s.numel())] = s
        return out.to(weight.device), into.to(weight.device)

    def scaled(self, name: str) -> Tensor:
        """A layer's weight under the scales of now, float32 [N, K]."""
        out, into = self.rows_and_columns(name)
        return self.weight(name).float() * into / out[:, None]

    def ranges(self, group: ScaleGroup) -> tuple[Tensor, Tensor]:
        """``max|w|`` of the source's rows and of the targets' columns, float32 [N] each."""
        rows = self.scaled(group.source).abs().amax(1).cpu()
        columns = torch.stack([self.scaled(n).abs().amax(0).cpu() for n in group.targets]).amax(0)
        channels = group.source_channels(columns.numel())
        joint = torch.zeros_like(rows).scatter_reduce(0, channels, columns, "amax")
        return rows, joint

    def sweep(self) -> float:
        """Equalize each group once; the largest relative change of a scale."""
        moved = 0.0
        for group, old in self.scales.items():
            rows, columns = self.ranges(group)
            factor = torch.where((rows > 0) & (columns > 0), (rows / columns).sqrt(), 1.0)
            new = old * factor[group.source_channels(old.numel())]
            new = new.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
            self.scales[group] = new
            moved = max(moved, float((new / old).log().abs().max()))
        return moved

    def readers(self, name: str) -> Tensor:
        """float32 [N]: squared norms of the columns that read each output channel of a layer;
        ones where nothing in the chain reads it."""
        weight = self.weight(name)
        group = next((g for g in self.groups if g.source == name), None)
        if group is None:
            return torch.ones(weight.shape[0], device=weight.device)
        columns = sum(self.weight(n).float().square().sum(0) for n in group.targets)
        assert isinstance(columns, Tensor)
        channels = group.source_channels(columns.numel()).to(weight.device)
        empty = torch.zeros(weight.shape[0], device=weight.device)
        return empty.index_add(0, channels, columns)
