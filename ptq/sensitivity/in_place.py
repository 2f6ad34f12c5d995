"""A float model that runs again and again with some layers changed, from the first of them on."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.calibrate import (
    BlockStream,
    NotAChain,
    TokenSet,
    advance,
    batches,
    call,
    capture,
    outputs_after_blocks,
)
from ptq.calibrate.inputs import batches_of, padding_mask
from ptq.errors import CalibrationError, ModelError
from ptq.model import block_lists, check_tokens, eval_mode, output_head
from ptq.sensitivity.change import Change, changed
from ptq.sensitivity.distance import Distances, measure_of

_SAME = 1e-6  # a distance that rounding in another order may have


class InPlace:
    """How far a float model's predictions move when some of its layers are changed.

    The hidden states before each block are kept, so that only the blocks from the first changed
    layer on run again: (blocks + 1) x tokens x hidden size numbers, beside the log-probabilities of
    each token. Where the blocks are not a chain (``chain`` is None), the whole model runs.

    What is measured, says :class:`~ptq.sensitivity.distance.Distances`.

    Args:
        model: float; linear layers that are stand-ins (``ptq.model.unfolded``) are in place.
        data: token windows, or batches as calibration takes them; they are kept.

    Raises:
        CalibrationError: no batch, or none with two tokens.
        ModelError: the float model's outputs are not finite.
    """

    def __init__(self, model: nn.Module, data: TokenSet | Iterable[Any]) -> None:
        self.model = model
        if isinstance(data, TokenSet):
            if isinstance(model, PreTrainedModel):
                check_tokens(model.config, data.sequences, f"text {', '.join(data.source)}")
            data = batches(data, 1)
        self.batches = list(batches_of(data))
        if not self.batches:
            raise CalibrationError("there are no batches to measure on; give at least one")
        self.measure = measure_of(model)
        self.runs = 0
        """Blocks that have run since, a batch at a time."""
        self._distances = Distances(self.measure)
        self.chain: BlockStream | None = None
        self.broken = ""
        """Why the blocks are not a chain."""
        self._kept: list[list[Tensor]] = []  # by block, by batch; the last: behind all blocks
        with eval_mode(model), torch.no_grad():
            self._record()

    @property
    def tokens(self) -> int:
        """Predictions that are compared, or rows of outputs."""
        return self._distances.count

    def _record(self) -> None:
        outputs = [call(self.model, batch, i) for i, batch in enumerate(self.batches)]
        for batch, output in zip(self.batches, outputs, strict=True):
            self._distances.remember(output, padding_mask(batch))
        if self.tokens == 0:
            raise CalibrationError("no token of the data has a next one; give longer windows")
        lists = block_lists(self.model)
        if len(lists) != 1:
            self.broken = f"the model has {len(lists)} lists of blocks"
            return
        try:
            stream = capture(self.model, lists[0], self.batches)
            self._kept.append(list(stream.hidden))
            for position, name in enumerate(stream.names):
                advance(stream, position, self.model.get_submodule(name))
                self._kept.append(list(stream.hidden))
        except NotAChain as error:
            self.broken = str(error)
            return
        # What is between blocks may also be read behind them: then skipping blocks gives
        # something else.
        again = outputs_after_blocks(self.model, stream, self.batches[0], 0)
        if self._distances.of(again, 0) > _SAME * self._distances.size:
            self.broken = "what is between its blocks is read behind them as well"
            return
        self.chain = stream

    def distance(self, changes: Mapping[str, Change]) -> float:
        """Of the model with these layers changed, by name; the model is left as it was, bit for
        bit, whatever happens.

        Raises:
            ModelError: the changed model's outputs are not finite.
        """
        total = 0.0
        start = self._start(changes)
        with eval_mode(self.model), torch.no_grad(), changed(self.model, changes):
            for index, batch in enumerate(self.batches):
                if self.chain is None or start is None:
                    output = call(self.model, batch, index)
                else:
                    output = self._from(self.chain, start, index)
                total += self._distances.of(output, index)
        if not torch.tensor(total).isfinite():
            raise ModelError(f"with {', '.join(changes)} quantized, the outputs are not finite")
        return total / self._distances.size

    def _start(self, changes: Mapping[str, Change]) -> int | None:
        """The first block that has to run: None for all of the model."""
        if self.chain is None:
            return None
        first = len(self.chain.names)
        head = output_head(self.model)
        for name in changes:
            place = self.block_of(name)
            if place is None and self.model.get_submodule(name) is not head:
                return None
            first = first if place is None else min(first, place)
        return first

    def block_of(self, layer: str) -> int | None:
        """The position of the block that a layer is in."""
        names = [] if self.chain is None else self.chain.names
        return next((i for i, n in enumerate(names) if layer.startswith(f"{n}.")), None)

    def _from(self, chain: BlockStream, start: int, index: int) -> Any:
        hidden = self._kept[start][index]
        for position in range(start, len(chain.names)):
            block = self.model.get_submodule(chain.names[position])
            hidden = chain.calls[index][position].run(block, hidden)
            self.runs += 1
        tail = replace(chain, hidden=list(self._kept[-1]))
        tail.hidden[index] = hidden
        return outputs_after_blocks(self.model, tail, self.batches[index], index)

    def distance_of(self, model: nn.Module) -> float:
        """Of another model of the same inputs and outputs."""
        total = 0.0
        with eval_mode(model), torch.no_grad():
            for index, batch in enumerate(self.batches):
                total += self._distances.of(call(model, batch, index), index)
        return total / self._distances.size

    def stream_at(self, position: int) -> BlockStream:
        """The float model's stream as it enters a block (or is behind the last one); a copy whose
        tensors are shared. Only of a chain."""
        assert self.chain is not None
        return replace(self.chain, hidden=list(self._kept[position]))
