"""The inputs of a model's blocks, captured once and then carried from block to block.

Calibration data goes through the embeddings once. From then on only the hidden states between two
blocks are kept, so that memory does not grow with the depth of the model, and only one block
runs at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate.inputs import batches_of, call, padding_mask
from ptq.errors import CalibrationError
from ptq.model import eval_mode

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Park = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BlockCall:
    """How the model calls one block, the hidden states left out.

    Args:
        arguments: positional ones; the first stands for the hidden states if ``keyword`` is None.
        keyword: name of the argument with the hidden states, or None if it is the first one.
        keywords: the other keyword arguments: masks, position embeddings.
    """

    arguments: tuple[Any, ...]
    keyword: str | None
    keywords: dict[str, Any]

    @classmethod
    def of(cls, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple["BlockCall", Tensor]:
        """The call, and the hidden states taken out of it."""
        if arguments:
            return cls(arguments[1:], None, keywords), arguments[0]
        name = next((k for k, v in keywords.items() if isinstance(v, Tensor)), None)
        if name is None:
            raise CalibrationError(
                "a block was called without a tensor, so it cannot be calibrated"
            )
        rest = {key: value for key, value in keywords.items() if key != name}
        return cls((), name, rest), keywords[name]

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All positional and all keyword arguments."""
        if self.keyword is None:
            return (hidden, *self.arguments), self.keywords
        return (), {self.keyword: hidden, **self.keywords}

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states.

        Raises:
            NotAChain: it returns something else, or another shape.
        """
        arguments, keywords = self.with_hidden(hidden)
        out = block(*arguments, **keywords)
        if not isinstance(out, Tensor) or out.shape != hidden.shape:
            raise NotAChain(f"{_described(out)}, not hidden states of its input's shape")
        return out


@dataclass(eq=False)
class BlockStream:
    """The calibration batches on their way through a list of blocks.

    Args:
        names: of the blocks, in order.
        hidden: per batch, the hidden states that enter the next block.
        calls: per batch and block, how it is called.
        masks: per batch, bool [B, T], false where padded, or None.
        park: gets each new hidden state and gives back the tensor to hold in its place, with the
            same values: one in a file, so that all of them need not be in memory.
    """

    names: list[str]
    hidden: list[Tensor]
    calls: list[list[BlockCall]]
    masks: list[Tensor | None]
    park: Park | None = None

    def held(self, hidden: Tensor) -> Tensor:
        """What to hold of a new hidden state."""
        return hidden if self.park is None else self.park(hidden)


class NotAChain(Exception):
    """The blocks do not just hand hidden states from one to the next; the text says why."""


@torch.no_grad()
def capture(
    model: nn.Module,
    names: Sequence[str],
    data: Iterable[Any],
    progress: Progress = iter,
    *,
    run_first: bool = True,
    park: Park | None = None,
) -> BlockStream:
    """What enters the first of the named blocks, and how each block is called.

    The first batch runs through the whole model, which shows that each block's output is the
    next one's input. For the others the blocks are skipped, so this takes little time.

    Args:
        run_first: false: skip the blocks in the first batch too, as they have no weights yet;
            what a block returns is then only checked when it runs (:meth:`BlockCall.run`).
        park: of the stream.

    Raises:
        NotAChain: the blocks are not called once each, in order, on each other's output.
        CalibrationError: no batch.
    """
    blocks = [model.get_submodule(name) for name in names]
    stream = BlockStream(list(names), [], [], [], park)
    with eval_mode(model):
        for index, batch in enumerate(progress(batches_of(data))):
            skip = index > 0 or not run_first
            calls, inputs, outputs = _watch(model, blocks, batch, index, skip)
            if index == 0:
                _check_chain(names, inputs, outputs)
            if inputs[0].is_meta:
                raise NotAChain(f"what enters {names[0]} comes from blocks without weights")
            stream.hidden.append(stream.held(inputs[0]))
            stream.calls.append(calls)
            stream.masks.append(padding_mask(batch))
    if not stream.hidden:
        raise CalibrationError("calibration got no batches; give some, and a generator only once")
    return stream


class _LastBlock(Exception):
    """The last block was called; the rest of the model need not run."""


def _watch(
    model: nn.Module, blocks: list[nn.Module], batch: Any, index: int, skip: bool
) -> tuple[list[BlockCall], list[Tensor], list[Any]]:
    """Run one batch up to the last block; what each block was called with, and returned."""
    calls: list[BlockCall] = []
    inputs: list[Tensor] = []
    outputs: list[Any] = []

    def seen(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            made, hidden = BlockCall.of(arguments, keywords)
            calls.append(made)
            inputs.append(hidden)
            out = hidden if skip else original(*arguments, **keywords)
            outputs.append(out)
            if len(calls) == len(blocks):
                raise _LastBlock
            return out

        return forward

    with _replaced_forwards(blocks, seen):
        try:
            call(model, batch, index)
        except _LastBlock:
            return calls, inputs, outputs
    raise NotAChain(f"{len(calls)} of {len(blocks)} blocks were called")


@contextmanager
def _replaced_forwards(
    blocks: list[nn.Module],
    make: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Another ``forward`` on each block, taken off whatever happens."""
    own = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = make(block, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _described(out: Any) -> str:
    if isinstance(out, Tensor):
        return f"it returns a tensor of shape {list(out.shape)}"
    return f"it returns a {type(out).__name__}"


def _check_chain(names: Sequence[str], inputs: list[Tensor], outputs: list[Any]) -> None:
    for i, out in enumerate(outputs):
        if isinstance(out, tuple | list) and any(isinstance(x, Tensor) for x in out[1:]):
            raise NotAChain(f"block {names[i]} returns more than hidden states")
        if isinstance(out, tuple | list):
            raise NotAChain(f"block {names[i]} returns a {type(out).__name__}")
        if not isinstance(out, Tensor) or out.shape != inputs[i].shape:
            raise NotAChain(f"block {names[i]} does not return hidden states of its input's shape")
        if i + 1 < len(inputs) and inputs[i + 1] is not out:
            raise NotAChain(f"block {names[i + 1]} does not read what {names[i]} returns")


@torch.no_grad()
def advance(stream: BlockStream, position: int, block: nn.Module) -> None:
    """Replace the hidden states by what the block makes of them."""
    for index, hidden in enumerate(stream.hidden):
        made = stream.calls[index][position].run(block, hidden)
        stream.hidden[index] = stream.held(made)


@torch.no_grad()
def outputs_after_blocks(model: nn.Module, stream: BlockStream, batch: Any, index: int) -> Any:
    """What the model returns for a batch whose hidden states are carried behind its blocks."""
    blocks = [model.get_submodule(name) for name in stream.names]

    def skipped(block: nn.Module, _: Callable[..., Any]) -> Callable[..., Any]:
        last = block is blocks[-1]
        return lambda *args, **kw: stream.hidden[index] if last else BlockCall.of(args, kw)[1]

    with _replaced_forwards(blocks, skipped):
        return call(model, batch, index)
