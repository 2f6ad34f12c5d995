"""What a model does with a list of blocks: how it calls each, and whether they are a chain."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq.core import FastProducts
from ptq.errors import CalibrationError


class NotAChain(Exception):
    """The blocks do not just hand hidden states from one to the next; the text says why."""


@dataclass(frozen=True, eq=False)
class BlockCall:
    """How the model calls one block, the hidden states left out.

    Args:
        arguments: positional ones; the first stands for the hidden states if ``keyword`` is None.
        keyword: name of the argument with the hidden states, or None if it is the first one.
        keywords: the other keyword arguments: masks, position embeddings.
        others: what the block returns behind the hidden states, in a tuple, which is the same
            for all blocks and whatever the hidden states are: T5's position biases. None where
            it returns the hidden states alone.
    """

    arguments: tuple[Any, ...]
    keyword: str | None
    keywords: dict[str, Any]
    others: tuple[Any, ...] | None = None

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

    def returned(self, hidden: Tensor) -> Any:
        """What the block returns where it makes these hidden states."""
        return hidden if self.others is None else (hidden, *self.others)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states.

        Raises:
            NotAChain: it returns something else, or another shape.
        """
        arguments, keywords = self.with_hidden(hidden)
        with FastProducts():
            out = block(*arguments, **keywords)
        if self.others is not None and type(out) is tuple and out:
            out = out[0]
        if not isinstance(out, Tensor) or out.shape != hidden.shape:
            raise NotAChain(f"{_described(out)}, not hidden states of its input's shape")
        return out


def _described(out: Any) -> str:
    if isinstance(out, Tensor):
        return f"it returns a tensor of shape {list(out.shape)}"
    return f"it returns a {type(out).__name__}"


def check_chain(names: Sequence[str], inputs: Sequence[Tensor], outputs: Sequence[Any]) -> None:
    """Whether each block returns hidden states like those that it reads, alone or first in a
    tuple, and the next block reads them.

    Raises:
        NotAChain: one does not.
    """
    for i, out in enumerate(outputs):
        first = out[0] if type(out) is tuple and out else out
        if not isinstance(first, Tensor) and isinstance(out, tuple | list):
            raise NotAChain(f"block {names[i]} returns a {type(out).__name__}")
        if not isinstance(first, Tensor) or first.shape != inputs[i].shape:
            raise NotAChain(f"block {names[i]} does not return hidden states of its input's shape")
        if i + 1 < len(inputs) and inputs[i + 1] is not first:
            raise NotAChain(f"block {names[i + 1]} does not read what {names[i]} returns")


def check_others(
    names: Sequence[str], first: nn.Module, call: BlockCall, hidden: Tensor, outputs: Sequence[Any]
) -> None:
    """Whether all that the blocks return behind the hidden states is what the first one made, and
    it makes the same of other hidden states.

    Args:
        first: the first block, which is run on other hidden states than those in the batch.
        call, hidden: how it was called.
        outputs: of the blocks on a batch; those of :func:`check_chain`.

    Raises:
        NotAChain: it is not.
    """
    others = others_of(outputs[0])
    for name, out in zip(names, outputs, strict=True):
        found = others_of(out)
        if (found is None) != (others is None) or len(found or ()) != len(others or ()):
            raise NotAChain(f"block {name} does not return as many values as {names[0]}")
        if any(x is not y for x, y in zip(found or (), others or (), strict=True)):
            raise NotAChain(f"block {name} returns more than hidden states, and makes it itself")
    if not any(x is not None for x in others or ()):
        return
    arguments, keywords = call.with_hidden(hidden.neg() * 0.5 + 1.0)
    again = others_of(first(*arguments, **keywords)) or ()
    for x, y in zip(others or (), again, strict=True):
        if not (x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y))):
            raise NotAChain(
                f"block {names[0]} returns more than hidden states, and it depends on them"
            )


def others_of(out: Any) -> tuple[Any, ...] | None:
    """What a block returned behind the hidden states; None where it returned those alone."""
    return out[1:] if type(out) is tuple else None
