"""Where a decoder's residual stream begins and ends: its embedding, its last norm, its head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate import BlockStream, capture, outputs_after_blocks
from ptq.errors import UnsupportedError
from ptq.model import untie_head
from ptq.transforms.probe import Flow, restored, same_tensor, watched
from ptq.transforms.residual.turn import Turn, turn_columns

_ROWS = 16  # last positions of the sequence, whose logits are compared


@dataclass(frozen=True, eq=False)
class Ends:
    """What is outside of the blocks.

    Args:
        norm: gives what the head reads.
        offset: of a norm that multiplies by ``offset + weight``.
    """

    embedding: nn.Embedding
    norm: nn.Module
    head: nn.Linear
    offset: int = 0

    @property
    def factor(self) -> Tensor:
        """float32 [hidden]: what the norm multiplies by."""
        return self._weight.detach().float() + self.offset

    @property
    def _weight(self) -> nn.Parameter:
        weight = self.norm.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def flatten(self) -> None:
        """Let the norm multiply by one, in place."""
        self._weight.fill_(1 - self.offset)

    @torch.no_grad()
    def fold(self, model: nn.Module, turn: Turn) -> None:
        """Let the embedding give turned states, and the head read them, in place; a head that is
        tied to the embedding gets a weight of its own."""
        untie_head(model)
        turn_columns(self.embedding.weight, turn)
        turn_columns(self.head.weight, turn, self.factor)
        self.flatten()


def find_ends(
    model: nn.Module,
    stream: BlockStream,
    batch: Any,
    embedding: nn.Embedding,
    head: nn.Linear,
    turn: Turn,
) -> Ends:
    """The ends of a model, proved by a run without its blocks, in its own dtype.

    Args:
        stream: what enters the blocks for the batch, none of which has run.

    Raises:
        UnsupportedError: the model does not do on turned states what it did.
    """
    before: list[Tensor] = []
    flow = watched(model, lambda: before.append(_logits(model, stream, batch)))
    name = next(n for n, module in model.named_modules() if module is head)
    read = flow.reads.get(name)
    norm = None if read is None else _giver(model, flow, read)
    if norm is None:
        raise _unsupported("what its output head reads comes from no norm with a weight")
    made = (Ends(embedding, norm, head, offset) for offset in (0, 1))
    tried = [(_difference(model, stream, batch, ends, turn, before[0]), ends) for ends in made]
    off, ends = min(tried, key=lambda pair: pair[0])
    # What a structure does that is not allowed is of the order of one, and rounding is not.
    if not off <= max(1e-3, 16 * torch.finfo(embedding.weight.dtype).eps):
        raise _unsupported(
            f"its embedding, last norm and head do not do the same on a rotated residual stream "
            f"(off by {off:.2g})"
        )
    return ends


def _giver(model: nn.Module, flow: Flow, read: Tensor) -> nn.Module | None:
    """The module with a weight for each channel that gave a tensor."""
    for name, given in flow.gives.items():
        module = model.get_submodule(name)
        weight = module._parameters.get("weight")
        if weight is not None and weight.shape == given.shape[-1:] and same_tensor(given, read):
            return module
    return None


def _difference(
    model: nn.Module, stream: BlockStream, batch: Any, ends: Ends, turn: Turn, before: Tensor
) -> float:
    """Of the logits, relative: with turned embeddings, and turned back in front of the head."""
    factor = ends.factor

    def turned(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return turn(out).to(out.dtype)

    def back(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((turn.back(given[0]) * factor).to(given[0].dtype), *given[1:])

    hooks = [
        ends.embedding.register_forward_hook(turned),
        ends.head.register_forward_pre_hook(back),
    ]
    try:
        with restored([ends.norm]), torch.no_grad():
            ends.flatten()
            turned_stream = capture(model, stream.names, [batch], run_first=False)
            after = _logits(model, turned_stream, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return float((after - before).norm() / before.norm())


def _logits(model: nn.Module, stream: BlockStream, batch: Any) -> Tensor:
    """float32 [B, T, V] of the last positions, the blocks left out."""
    out = outputs_after_blocks(model, stream, batch, 0)
    logits = out[0] if isinstance(out, tuple) or hasattr(out, "keys") else out
    assert isinstance(logits, Tensor)
    return logits[..., -_ROWS:, :].float()


def _unsupported(problem: str) -> UnsupportedError:
    return UnsupportedError(f"residual_rotation: {problem}; leave the step out")
