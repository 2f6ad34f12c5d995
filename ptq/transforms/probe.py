"""Running a block on one of its real inputs: what its modules read, and whether a scaling of
its weights leaves its output as it was."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.transforms.apply import mix_source, mix_targets, scale_source, scale_targets
from ptq.transforms.base import ScaleGroup
from ptq.transforms.calls import mapped, tensors_in

_TOLERANCE = 1e-4  # of what scaling the source alone does to the output


@dataclass(eq=False)
class Probe:
    """A block and one input of it; every run is on copies of the containers that it is given."""

    block: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    usual: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.usual = self.run()

    def run(self) -> list[Tensor]:
        """Every tensor that the block returns, or leaves in a container for later blocks."""
        given = list(tensors_in((self.arguments, self.keywords)))
        arguments, keywords = mapped((self.arguments, self.keywords), lambda x: x)
        made = tensors_in((self.block(*arguments, **keywords), arguments, keywords))
        return [x.clone() for x in made if not any(x is y for y in given)]

    def preserves(self, group: ScaleGroup) -> bool:
        """Whether scaling the group leaves the output as it is; weights are restored.

        The scales are random powers of two, by which floating point of any width multiplies
        exactly; so what remains is compared with what scaling the source alone does, and may be
        hardly anything. A norm's weight is replaced by one that gives the factor 1 meanwhile, so
        that the same holds for a weight that is stored less 1.
        """
        columns = self.block.get_submodule(group.targets[0]).weight
        assert isinstance(columns, Tensor)
        channels = group.source_channels(columns.shape[1])
        generator = torch.Generator().manual_seed(0)
        powers = torch.tensor([0.25, 0.5, 2.0, 4.0])
        s = powers[torch.randint(4, (int(channels.max()) + 1,), generator=generator)][channels]
        return self._unchanged(
            group,
            lambda: scale_source(self.block, group, s),
            lambda: scale_targets(self.block, group, s),
        )

    def mixes(self, group: ScaleGroup, size: int) -> bool:
        """Whether the channels of each ``size`` consecutive ones can be mixed by any matrix;
        weights are restored.

        The group is known to hold for any positive scales. Here channels of a head change places
        and signs, exactly. What every such change commutes with multiplies all channels of a head
        by the same number, and so commutes with every matrix.
        """
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(size, generator=generator)
        signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1.0

        def shuffled(x: Tensor) -> Tensor:
            heads = x.reshape(*x.shape[:-1], -1, size)
            return (heads[..., order.to(x.device)] * signs.to(x.device)).reshape(x.shape)

        return self._unchanged(
            group,
            lambda: mix_source(self.block, group, shuffled),
            lambda: mix_targets(self.block, group, shuffled),
        )

    def _unchanged(
        self, group: ScaleGroup, at_source: Callable[[], None], at_targets: Callable[[], None]
    ) -> bool:
        """Whether two changes undo each other, and the first alone does not do nothing."""
        source = self.block.get_submodule(group.source)
        modules = [source, *(self.block.get_submodule(name) for name in group.targets)]
        assert isinstance(source.weight, Tensor)
        before = self.usual
        with torch.no_grad(), restored(modules):
            if group.kind == "norm":
                source.weight.fill_(1 - group.offset)
                before = self.run()
            at_source()
            alone = _distance(before, self.run())
            at_targets()
            after = _distance(before, self.run())
        return 0 < alone < math.inf and after <= _TOLERANCE * alone

    def watch(self) -> "Flow":
        """What each module without children reads and gives in a run, in the order of calls."""
        return watched(self.block, self.run)


@dataclass(eq=False)
class Flow:
    """First input and output of the modules of a block, by name, in the order of their calls."""

    reads: dict[str, Tensor] = field(default_factory=dict)
    gives: dict[str, Tensor] = field(default_factory=dict)


def watched(module: nn.Module, run: Callable[[], object]) -> Flow:
    """What each module without children in this one reads and gives in a run."""
    flow = Flow()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def seen(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(out, Tensor):
                flow.reads[name], flow.gives[name] = given[0], out

        return seen

    leaves = [(n, m) for n, m in module.named_modules() if not any(m.children())]
    handles = [leaf.register_forward_hook(hook(name)) for name, leaf in leaves]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return flow


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """The same values in the same memory, perhaps in another shape."""
    return a is b or (
        a.numel() == b.numel()
        and a.shape[-1:] == b.shape[-1:]
        and a.dtype == b.dtype
        and a.data_ptr() == b.data_ptr()
    )


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules' own parameters, bit for bit as they were, whatever happens within."""
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    kept = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, kept, strict=True):
                parameter.copy_(old)


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The norm of all differences; infinite where shapes differ, or a value is no number."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return math.inf
    squares = [float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True)]
    return math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.inf
