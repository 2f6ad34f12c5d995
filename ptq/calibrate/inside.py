"""What the linear layers inside one block see, while a stream runs through it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate.inputs import all_finite, call, padding_mask, unmasked_rows
from ptq.calibrate.stream import BlockStream
from ptq.errors import CalibrationError

See = Callable[[str, Tensor], None]


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Call ``see(name, x)`` before each of the layers runs; hooks are taken off at the end."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: see(name, args[0] if args else kwargs["input"])

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(
    stream: BlockStream, position: int, block: nn.Module, layers: Mapping[str, nn.Module]
) -> Iterator[dict[str, Tensor]]:
    """For each batch, the rows [R, K] that each layer reads; layers that read the same tensor
    get the same object.

    A layer that the batch does not reach (an expert) is left out. What the block does after the
    last of the layers is left out as well, once a batch has shown that it reaches each once.

    Raises:
        CalibrationError: NaN or Inf (layer and batch are named).
    """
    once = False
    for index, hidden in enumerate(stream.hidden):
        seen = _Seen(stream, position, index, len(layers) if once else 0)
        with watching(layers, seen), torch.no_grad(), suppress(_Enough):
            stream.calls[index][position].run(block, hidden)
        once = once or seen.calls == len(seen.rows) == len(layers)
        yield seen.rows


class _Enough(Exception):
    """Every layer has been reached."""


@dataclass(eq=False)
class _Seen:
    """What the layers of a block read of one batch.

    Args:
        enough: end the run when this many layers have been reached; 0 for never.
    """

    stream: BlockStream
    position: int
    index: int
    enough: int
    rows: dict[str, Tensor] = field(default_factory=dict, init=False)
    calls: int = field(default=0, init=False)
    tensors: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    """What was read, and its rows; kept alive, so that identity means identity."""

    def __call__(self, name: str, x: Tensor) -> None:
        self.calls += 1
        known = next((rows for tensor, rows in self.tensors if tensor is x), None)
        if known is None:
            known = unmasked_rows(x.detach(), self.stream.masks[self.index])
            _refuse_nan(f"{self.stream.names[self.position]}.{name}", known, self.index)
            self.tensors.append((x, known))
        self.rows[name] = torch.cat([self.rows[name], known]) if name in self.rows else known
        if len(self.rows) == self.enough:
            raise _Enough


def inputs_of_model(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, index: int
) -> dict[str, Tensor]:
    """The rows [R, K] that each layer reads when the whole model runs on one batch.

    Raises:
        CalibrationError: NaN or Inf (layer and batch are named).
    """
    rows: dict[str, Tensor] = {}
    mask = padding_mask(batch)

    def see(name: str, x: Tensor) -> None:
        found = unmasked_rows(x.detach(), mask)
        _refuse_nan(name, found, index)
        rows[name] = torch.cat([rows[name], found]) if name in rows else found

    with watching(layers, see), torch.no_grad():
        call(model, batch, index)
    return rows


def _refuse_nan(name: str, rows: Tensor, batch: int) -> None:
    if not all_finite(rows):
        raise CalibrationError(
            f"layer {name}: its input has NaN or Inf in calibration batch {batch} (counted from "
            "0); run the float model on it to find out why, or leave the layer in float"
        )
