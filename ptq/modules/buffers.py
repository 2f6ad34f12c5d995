"""A QuantizedWeight as the buffers of a module: how it is registered, read back and moved."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptq.config import Scheme
from ptq.core import QuantizedWeight, packed_width

BUFFERS = ("codes", "scale", "zero_point", "input_scale", "input_zero_point", "input_order")


def buffers_of(weight: QuantizedWeight) -> dict[str, Tensor | None]:
    """The tensors of a weight by the names of :data:`BUFFERS`; nothing is copied."""
    values = (
        weight.packed,
        weight.scale,
        weight.zero_point,
        weight.input_scale,
        weight.input_zero_point,
        weight.input_order,
    )
    return dict(zip(BUFFERS, values, strict=True))


def register(module: nn.Module, weight: QuantizedWeight) -> None:
    """Make the tensors of a weight the buffers of a module; nothing is copied."""
    for name, value in buffers_of(weight).items():
        module.register_buffer(name, value)


def held_weight(module: nn.Module, scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """The buffers as a value; nothing is copied."""
    return weight_of(module._buffers, scheme, shape)


def weight_of(
    buffers: Mapping[str, Tensor | None], scheme: Scheme, shape: tuple[int, int]
) -> QuantizedWeight:
    """The weight of these tensors, those that are None left out or not; nothing is copied."""
    codes, scale, zero_point, *of_input = (buffers.get(name) for name in BUFFERS)
    assert codes is not None and scale is not None
    weights = scheme.weights
    return QuantizedWeight(
        codes,
        scale,
        zero_point,
        weights.number_format,
        weights.granularity_value,
        shape,
        *of_input,
    )


def empty_weight(rows: int, columns: int, scheme: Scheme) -> QuantizedWeight:
    """A weight of the right shapes and dtypes on the meta device, to be loaded into."""
    fmt, gran = scheme.weights.number_format, scheme.weights.granularity_value
    scale_shape = gran.scale_shape((rows, columns))
    activations = scheme.activations
    static = activations is not None and activations.mode == "static"

    codes = torch.int8 if fmt.bits == 8 else torch.uint8

    def empty(size: tuple[int, ...], dtype: torch.dtype, wanted: bool = True) -> Any:
        return torch.empty(size, dtype=dtype, device="meta") if wanted else None

    return QuantizedWeight(
        empty((rows, packed_width(columns, fmt.bits)), codes),
        empty(scale_shape, scheme.weights.torch_scale_dtype),
        empty(scale_shape, torch.int8, not scheme.weights.symmetric),
        fmt,
        gran,
        (rows, columns),
        empty((), torch.float32, static),
        empty((), torch.int32, static and activations is not None and not activations.symmetric),
        empty((columns,), torch.int32, scheme.input_order),
    )


@contextmanager
def kept_scales(
    module: nn.Module, names: Iterable[str] = ("scale", "input_scale")
) -> Iterator[None]:
    """Within it, ``.to()`` and the like may move these buffers but not change their dtype."""
    before = {name: module._buffers[name] for name in names}
    yield
    for name, old in before.items():
        new = module._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)


def share(owner: nn.Module, module: nn.Module) -> None:
    """Let ``module`` hold the very tensors of ``owner``, if they are on one device."""
    for name in BUFFERS:
        mine, own = module._buffers[name], owner._buffers[name]
        if mine is not None and own is not None and mine.device == own.device:
            module._buffers[name] = own


def shares(owner: nn.Module, module: nn.Module) -> bool:
    """Whether the codes of both are one tensor."""
    mine, own = (_place(m._buffers["codes"]) for m in (module, owner))
    return mine is not None and mine == own


def _place(codes: Tensor | None) -> object:
    if codes is None or codes.is_meta:
        return None
    return codes.device, codes.data_ptr(), codes.shape
