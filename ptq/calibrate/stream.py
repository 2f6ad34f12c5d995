"""The inputs of a model's blocks, captured once and then carried from block to block.

Calibration data goes through the embeddings once. From then on only the hidden states between two
blocks are kept, so that memory does not grow with the depth of the model, and only one block
runs at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate.chain import BlockCall, NotAChain, check_chain, check_others, others_of
from ptq.calibrate.inputs import batches_of, call, padding_mask
from ptq.errors import CalibrationError
from ptq.model import eval_mode

Progress = Callable[[Iterable[Any]], Iterable[Any]]
Park = Callable[[Tensor], Tensor]


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
    next one's input. For the others the blocks are skipped, so this takes little time; but for the
    first one, where the blocks hand on what it makes beside the hidden states.

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
    running = len(blocks) if run_first else 0
    with eval_mode(model):
        for index, batch in enumerate(progress(batches_of(data))):
            calls, inputs, outputs = _watch(model, blocks, batch, index, running)
            if index == 0:
                check_chain(names, inputs, outputs)
                check_others(names, blocks[0], calls[0], inputs[0], outputs)
                # What all blocks return behind the hidden states, the first one makes.
                running = 0 if others_of(outputs[0]) is None else 1
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
    model: nn.Module, blocks: list[nn.Module], batch: Any, index: int, running: int
) -> tuple[list[BlockCall], list[Tensor], list[Any]]:
    """Run one batch up to the last block; what each block was called with, and returned.

    So many blocks do run. One that does not returns its hidden states as they are, and behind them
    what the first block returned there.
    """
    calls: list[BlockCall] = []
    inputs: list[Tensor] = []
    outputs: list[Any] = []

    def seen(_: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **keywords: Any) -> Any:
            made, hidden = BlockCall.of(arguments, keywords)
            if len(calls) >= running:
                made = replace(made, others=others_of(outputs[0]) if outputs else None)
                out = made.returned(hidden)
            else:
                out = original(*arguments, **keywords)
                made = replace(made, others=others_of(out))
            calls.append(made)
            inputs.append(hidden)
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
        known, last = stream.calls[index][blocks.index(block)], block is blocks[-1]
        return lambda *args, **kw: known.returned(
            stream.hidden[index] if last else BlockCall.of(args, kw)[1]
        )

    with _replaced_forwards(blocks, skipped):
        return call(model, batch, index)
