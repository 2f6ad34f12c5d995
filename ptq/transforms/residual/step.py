"""The residual stream of a decoder, rotated once and for all: nothing of it is left at run time.

Every block of a decoder reads its residual stream through norms, and adds to it what linear layers
give. A norm that only divides by a root mean square gives for rotated states the rotated result, so
the whole stream can be rotated by any orthogonal matrix Q: readers become ``W diag(g) Q`` with g
the weight of their norm, which then multiplies by one, writers ``Q^T W``, rows of the embedding
``e Q`` (Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456, section 4, stage 1a; that the model stays
the same, Ashkboos et al. 2024, "SliceGPT", arXiv 2401.15024, theorem 1). With a Hadamard matrix and
random signs no channel of the stream stands out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ptq.calibrate import BlockStream, NotAChain, capture
from ptq.errors import UnsupportedError
from ptq.model import block_lists, output_head, token_embedding
from ptq.transforms.residual.ends import find_ends
from ptq.transforms.residual.ports import Ports, find_ports
from ptq.transforms.residual.turn import Turn


class ResidualRotationOptions(BaseModel):
    """Which rotation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(0, description="of its signs")


@dataclass(eq=False)
class ResidualRotation:
    """A model whose ends are rotated, and its blocks as they are folded.

    Args:
        ports: of every block, by name.
    """

    model: nn.Module
    turn: Turn
    ports: dict[str, Ports]
    waiting: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = set(self.ports)

    def fold(self, block: str) -> None:
        """Fold the block of this name, which has its weights; does nothing the second time."""
        if block in self.waiting:
            self.ports[block].fold(self.model.get_submodule(block), self.turn)
            self.waiting.remove(block)

    def __str__(self) -> str:
        return f"residual stream rotated by {self.turn}, merged into the weights"


def require_stream(model: nn.Module) -> tuple[list[str], nn.Embedding, nn.Linear]:
    """The names of a decoder's blocks, its embedding and its head, from its structure alone; the
    model may be on the meta device.

    Raises:
        UnsupportedError: it is no decoder with one list of blocks, an embedding and a linear head
            of one width.
    """
    lists = block_lists(model)
    embedding, head = token_embedding(model), output_head(model)
    problem = None
    if len(lists) != 1:
        problem = f"has {len(lists)} lists of blocks, not one"
    elif not isinstance(embedding, nn.Embedding):
        problem = "has no token embedding"
    elif not isinstance(head, nn.Linear):
        problem = "has no linear output head, so its hidden states would come out rotated"
    elif head.in_features != embedding.embedding_dim:
        problem = (
            f"has an embedding of width {embedding.embedding_dim} and a head of {head.in_features}"
        )
    else:
        Turn.of(head.in_features, 0)
        return lists[0], embedding, head
    raise UnsupportedError(
        f"residual_rotation: {type(model).__name__} {problem}; leave the step out"
    )


@torch.no_grad()
def rotate_residual(
    model: nn.Module,
    batch: Any,
    options: ResidualRotationOptions,
    fill: Callable[[str], None] | None = None,
) -> ResidualRotation:
    """Rotate the ends of a float model in eval mode, in place; its blocks are the caller's to fold.

    Whether the model allows it is proved on the batch before anything is changed: one block of each
    kind is folded as a copy in float32 and run, and the ends are run without the blocks.

    Args:
        fill: gives the block of a name its weights, where they are not there from the start.

    Raises:
        UnsupportedError: the model does not do on rotated states what it did; which part of it.
    """
    names, embedding, head = require_stream(model)
    turn = Turn.of(head.in_features, options.seed)
    try:
        stream = capture(model, names, [batch], run_first=False)
    except NotAChain as reason:
        raise UnsupportedError(
            f"residual_rotation: {names[0]} to {names[-1]} are no chain: {reason}; leave it out"
        ) from None
    ends = find_ends(model, stream, batch, embedding, head, turn)
    ports = _ports(model, stream, turn, fill)
    ends.fold(model, turn)
    return ResidualRotation(model, turn, ports)


def _ports(
    model: nn.Module, stream: BlockStream, turn: Turn, fill: Callable[[str], None] | None
) -> dict[str, Ports]:
    """Of every block; found on the first one of each kind."""
    known: dict[tuple[Any, ...], Ports] = {}
    found: dict[str, Ports] = {}
    for position, name in enumerate(stream.names):
        block = model.get_submodule(name)
        kind = _kind(block)
        if kind not in known:
            if fill is not None:
                fill(name)
            call = stream.calls[0][position]
            known[kind] = find_ports(name, block, call, stream.hidden[0], turn)
        found[name] = known[kind]
    return found


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Its modules with their names and the shapes of their parameters."""
    return tuple(
        (name, type(module), *(p.shape for p in module.parameters(recurse=False)))
        for name, module in block.named_modules()
    )
