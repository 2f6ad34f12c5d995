"""What the layers of a block saw of their inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptq.algorithms import InputMoments
from ptq.config import Plugin, Scheme
from ptq.observers import Observer, SecondMoment, make_observer
from ptq.transforms import ChannelStats

_SAMPLE_ROWS = 1024  # of each layer's input, for the searches of transforms


@dataclass(eq=False)
class SeenInputs:
    """Moments and ranges of the inputs of some layers.

    Layers that read the same tensor share their moments. A layer that reads a selection of the
    rows (an expert) may read another selection in the float model; nothing is beside it then, and
    its moments have no ``cross``.

    Args:
        moments: wanted by the algorithm; ``cross`` likewise.
        observers: of the layers with static activations.
    """

    moments: bool
    cross: bool
    observers: dict[str, Observer]
    leaders: dict[str, str] = field(default_factory=dict, init=False)
    sums: dict[str, SecondMoment] = field(default_factory=dict, init=False)
    unpaired: set[str] = field(default_factory=set, init=False)

    @classmethod
    def of(
        cls, schemes: Mapping[str, Scheme], observer: Plugin, *, moments: bool, cross: bool
    ) -> "SeenInputs":
        observers = {
            name: make_observer(observer, scheme.activations)
            for name, scheme in schemes.items()
            if scheme.activations is not None and scheme.activations.mode == "static"
        }
        return cls(moments, cross, observers)

    @property
    def idle(self) -> bool:
        """Nothing is to be seen."""
        return not self.moments and not self.observers

    def update(self, rows: Mapping[str, Tensor], exact: Mapping[str, Tensor] | None) -> None:
        """Take in the rows [R, K] of each layer, and those of the float model beside them."""
        for name in self.observers.keys() & rows.keys():
            self.observers[name].update(rows[name])
        first: dict[int, str] = {}
        for name, x in rows.items() if self.moments else ():
            leader = self.leaders.setdefault(name, first.setdefault(id(x), name))
            if leader != name:
                continue
            if name not in self.sums:
                self.sums[name] = SecondMoment(x.shape[-1], cross=self.cross)
            self.sums[name].update(x, None if exact is None else self._beside(name, x, exact))

    def _beside(self, name: str, x: Tensor, exact: Mapping[str, Tensor]) -> Tensor:
        """The float model's rows; where they are others, x itself, which the sum must have."""
        found = exact.get(name)
        if found is not None and found.shape == x.shape and name not in self.unpaired:
            return found
        self.unpaired.add(name)
        return x

    def finish(self) -> dict[str, InputMoments]:
        """The moments by layer; layers that no row reached are left out."""
        made = {}
        for name, total in self.sums.items():
            if total.rows:
                moments = total.finish()
                cross = None if name in self.unpaired else moments.cross
                made[name] = InputMoments(moments.second, cross, moments.rows)
        return {name: made[leader] for name, leader in self.leaders.items() if leader in made}


@dataclass(eq=False)
class SampledInputs:
    """Some rows of each layer's input, drawn evenly from all batches, and what all rows reach."""

    batches: int
    generator: torch.Generator
    rows: dict[str, list[Tensor]] = field(default_factory=dict, init=False)
    absmax: dict[str, Tensor] = field(default_factory=dict, init=False)
    total: dict[str, Tensor] = field(default_factory=dict, init=False)
    count: dict[str, int] = field(default_factory=dict, init=False)

    def update(self, rows: Mapping[str, Tensor]) -> None:
        each = max(1, -(-_SAMPLE_ROWS // self.batches))
        for name, x in rows.items():
            if x.shape[0] == 0:
                continue
            picked = torch.randperm(x.shape[0], generator=self.generator)[:each]
            self.rows.setdefault(name, []).append(x[picked.to(x.device)].float())
            largest, summed = x.abs().amax(0).float(), x.abs().sum(0, dtype=torch.float32)
            known = name in self.count
            self.absmax[name] = torch.maximum(self.absmax[name], largest) if known else largest
            self.total[name] = self.total[name] + summed if known else summed
            self.count[name] = self.count.get(name, 0) + x.shape[0]

    def finish(self) -> tuple[dict[str, Tensor], dict[str, ChannelStats]]:
        """Sampled rows float32 [R, K], and what the channels of all rows reach, by layer."""
        samples = {name: torch.cat(parts) for name, parts in self.rows.items()}
        stats = {
            name: ChannelStats(self.absmax[name], self.total[name] / self.count[name])
            for name in samples
        }
        return samples, stats
