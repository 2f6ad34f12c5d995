"""What the linear layers inside one block see, while a stream runs through it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

    A layer that the batch does not reach (an expert) is left out.

    Raises:
        CalibrationError: NaN or Inf (layer and batch are named).
    """
    for index, hidden in enumerate(stream.hidden):
        rows: dict[str, Tensor] = {}
        seen: list[tuple[Tensor, Tensor]] = []  # kept alive, so that identity means identity

        def see(
            name: str,
            x: Tensor,
            index: int = index,
            rows: dict[str, Tensor] = rows,
            seen: list[tuple[Tensor, Tensor]] = seen,
        ) -> None:
            known = next((r for tensor, r in seen if tensor is x), None)
            if known is None:
                known = unmasked_rows(x.detach(), stream.masks[index])
                _refuse_nan(f"{stream.names[position]}.{name}", known, index)
                seen.append((x, known))
            rows[name] = torch.cat([rows[name], known]) if name in rows else known

        with watching(layers, see), torch.no_grad():
            stream.calls[index][position].run(block, hidden)
        yield rows


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
