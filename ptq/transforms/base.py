"""What a transform is given: groups of layers that share a scale, and what their inputs reach."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ptq.config import Scheme

LARGEST_SCALE = 1024.0
"""The largest scale of a channel, and one over the smallest."""


@dataclass(frozen=True)
class ScaleGroup:
    """A module whose output channels can be divided by anything that its readers multiply by.

    Args:
        source: the module that is divided by s; names are relative to the block.
        targets: the linear layers that read its output (and nothing else does); the columns of
            their weights are multiplied by s. No layer is a target of two groups.
        kind: norm: a normalization with a weight per channel; linear: a linear layer whose
            output is only multiplied or clipped at zero on its way; heads: the values of an
            attention.
        offset: of a norm that multiplies by ``offset + weight``: 0, or 1 (Gemma).
        head_dim: channels of a head where the targets see each head ``repeats`` times in a row
            (grouped-query attention); None where channel j of the source is channel j of the
            targets.
        mixes: of heads: so many consecutive channels, those of a head, can be mixed with each
            other by any matrix, the same for every head; None where that is not known.
    """

    source: str
    targets: tuple[str, ...]
    kind: Literal["norm", "linear", "heads"]
    offset: int = 0
    head_dim: int | None = None
    repeats: int = 1
    mixes: int | None = None

    def __str__(self) -> str:
        return f"{self.source} -> {', '.join(self.targets)}"

    def source_channels(self, columns: int) -> Tensor:
        """int64 [columns]: the source's output channel that each input channel of the targets is.

        >>> ScaleGroup("v", ("o",), "heads", head_dim=2, repeats=2).source_channels(8).tolist()
        [0, 1, 0, 1, 2, 3, 2, 3]
        """
        channel = torch.arange(columns)
        if self.head_dim is None:
            return channel
        return channel // (self.head_dim * self.repeats) * self.head_dim + channel % self.head_dim


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """What the channels of a layer's input reach over all rows: float32 [K] each, of ``|x|``."""

    absmax: Tensor
    absmean: Tensor


@dataclass(frozen=True)
class Preparation:
    """Rewrites the weights of a whole float model before its first block is calibrated; what the
    model computes stays the same.

    Args:
        require: ``(model)``; raises UnsupportedError where the structure of a model, which may be
            on the meta device, does not allow it.
        prepare: ``(model, batch, options, fill) -> prepared``: changes what is outside of the
            blocks. ``fill`` gives the block of a name its weights, or is None where all are there.
        options: the pydantic model of its options.
        unties: an output head that is tied to the embedding needs a weight of its own.
    """

    require: Callable[[nn.Module], object]
    prepare: Callable[[nn.Module, Any, Any, Callable[[str], None] | None], "Prepared"]
    options: type[BaseModel]
    unties: bool


class Prepared(Protocol):
    """A model whose blocks are still to be changed; as text, what was done."""

    def fold(self, block: str) -> None:
        """Change the block of this name, which has its weights; nothing the second time."""


@dataclass(frozen=True)
class Transform:
    """Rewrites the float weights of a block; what the float block computes stays the same.

    Args:
        apply: ``(block, groups, samples, stats, schemes, options) -> notes``, a note for each
            group that has a quantized target. ``samples`` are rows of the targets' inputs before
            the transform, float32 [R, K]; ``stats`` are over all rows; both and ``schemes`` are by
            name relative to the block, and layers without a scheme stay float. The inputs of the
            targets change: collect samples again before another transform. Within one, every
            layer is the target of one group at most, so its samples are right when it is its turn.
        options: the pydantic model of its options.
    """

    apply: Callable[
        [
            nn.Module,
            Sequence[ScaleGroup],
            Mapping[str, Tensor],
            Mapping[str, ChannelStats],
            Mapping[str, Scheme],
            Any,
        ],
        list[str],
    ]
    options: type[BaseModel]
