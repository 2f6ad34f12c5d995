"""One quantized layer as the tensors that the format stores, and back; codes never change."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.checkpoint.act_order import in_groups, order_of
from ptq.checkpoint.compressed_tensors.groups import Arguments, Group, Layout
from ptq.checkpoint.compressed_tensors.words import (
    from_words,
    to_words,
    word_count,
    zero_points_from_words,
    zero_points_to_words,
)
from ptq.checkpoint.foreign_read import Expected, finite
from ptq.checkpoint.foreign_write import Made, Values, lazily
from ptq.config import Scheme
from ptq.core import QuantizedWeight, pack
from ptq.core.quantized_weight import SCALE_DTYPES
from ptq.errors import CheckpointError
from ptq.formats import FLOAT8, INTEGERS, FloatFormat, IntFormat


def expected_tensors(group: Group, layout: Layout, rows: int, columns: int) -> dict[str, Expected]:
    """The tensors of a layer [rows, columns], by the last part of their names.

    Raises:
        CheckpointError: the group size does not divide the row.
    """
    weights = group.weights
    assert weights is not None
    bits = weights.num_bits
    scale = _scale_shape(weights, rows, columns)
    found = {"weight_scale": Expected(SCALE_DTYPES, scale)}
    if layout == "int-quantized":
        found["weight"] = Expected((torch.int8,), (rows, columns))
    elif layout == "float-quantized":
        found["weight"] = Expected((FLOAT8.dtype,), (rows, columns))
    else:
        found["weight_packed"] = Expected((torch.int32,), (rows, word_count(columns, bits)))
        found["weight_shape"] = Expected((torch.int64, torch.int32), (2,))
    if not weights.symmetric:
        packed = layout == "pack-quantized"
        shape = (word_count(rows, bits), *scale[1:]) if packed else scale
        kind = torch.int32 if packed else torch.int8
        found["weight_zero_point"] = Expected((kind,), shape)
    if weights.actorder in ("group", True) and weights.kind == "group":
        found["weight_g_idx"] = Expected((torch.int32, torch.int64), (columns,), optional=True)
    inputs = group.input_activations
    if inputs is not None and not inputs.dynamic:
        found["input_scale"] = Expected(SCALE_DTYPES, (1,))
        if not inputs.symmetric:
            found["input_zero_point"] = Expected((torch.int8,), (1,))
    return found


def _scale_shape(weights: Arguments, rows: int, columns: int) -> tuple[int, ...]:
    if weights.kind == "tensor":
        return (1,)
    if weights.kind == "channel":
        return rows, 1
    assert weights.group_size is not None
    if columns % weights.group_size:
        raise CheckpointError(
            f"its group size {weights.group_size} does not divide its input size {columns}, which "
            "ptq cannot load"
        )
    return rows, columns // weights.group_size


def read_weight(
    tensors: Mapping[str, Tensor], scheme: Scheme, layout: Layout, shape: tuple[int, int]
) -> QuantizedWeight:
    """The weight [N, K] of the tensors of one layer, which are as :func:`expected_tensors` says.

    Raises:
        CheckpointError: the stored shape is another, a code is out of range, or a scale is no
            number.
    """
    fmt, gran = scheme.weights.number_format, scheme.weights.granularity_value
    rows, columns = shape
    if isinstance(fmt, FloatFormat):
        packed = _numbers(tensors["weight"])
    elif layout == "pack-quantized":
        stored = tuple(tensors["weight_shape"].tolist())
        if stored != shape:
            raise CheckpointError(f"weight_shape is {list(stored)}, the layer has {list(shape)}")
        packed = from_words(tensors["weight_packed"], columns, fmt)
    else:
        packed = pack(_in_range("weight", tensors["weight"], fmt.bits), fmt)
    zero_point = tensors.get("weight_zero_point")
    if zero_point is not None and layout == "pack-quantized" and isinstance(fmt, IntFormat):
        zero_point = zero_points_from_words(zero_point, rows, fmt)
    scale_shape = gran.scale_shape(shape)
    if zero_point is not None:
        zero_point = _in_range("weight_zero_point", zero_point, fmt.bits).reshape(scale_shape)
    order = None
    if "weight_g_idx" in tensors and gran.group_size is not None and isinstance(fmt, IntFormat):
        order = order_of(tensors["weight_g_idx"], gran.group_size)
        packed = in_groups(packed, columns, fmt, order)
    return QuantizedWeight(
        packed,
        finite("weight_scale", tensors["weight_scale"]).reshape(scale_shape),
        zero_point,
        fmt,
        gran,
        shape,
        *_read_input(tensors),
        input_order=order,
    )


def _read_input(tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    if "input_scale" not in tensors:
        return None, None
    scale = finite("input_scale", tensors["input_scale"]).float().reshape(())
    zero_point = tensors.get("input_zero_point")
    return scale, None if zero_point is None else zero_point.to(torch.int32).reshape(())


def _in_range(name: str, codes: Tensor, bits: int) -> Tensor:
    fmt = INTEGERS[f"int{bits}"]
    if bits < 8 and codes.numel() and not (fmt.qmin <= codes.min() and codes.max() <= fmt.qmax):
        raise CheckpointError(f"{name} has codes beyond {bits} bits; the file is damaged")
    return codes


def _numbers(codes: Tensor) -> Tensor:
    """The bytes of floating-point codes, each of which is a number."""
    packed = pack(codes, FLOAT8)
    if bool(((packed & 0x7F) == 0x7F).any()):
        raise CheckpointError("weight has codes that are no numbers; the file is damaged")
    return packed


def stored_tensors(
    weight: QuantizedWeight, layout: Layout, scale_dtype: torch.dtype | None
) -> Made:
    """The tensors that the format stores of a weight.

    Args:
        scale_dtype: of the stored scales; None leaves them as they are.
    """
    return lazily(weight, lambda w: _values(w, layout, scale_dtype))


def _values(
    weight: QuantizedWeight, layout: Layout, scale_dtype: torch.dtype | None
) -> dict[str, Values]:
    fmt, packed = weight.format, layout == "pack-quantized"
    input_scale, input_zero_point = weight.input_scale, weight.input_zero_point
    zero_point = weight.zero_point

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(1) if weight.granularity.kind == "tensor" else tensor

    def cast(tensor: Tensor) -> Tensor:
        return tensor if scale_dtype is None else tensor.to(scale_dtype)

    made: dict[str, Values] = {"weight_scale": lambda: cast(flat(weight.scale))}
    if packed and isinstance(fmt, IntFormat):
        made["weight_packed"] = lambda: to_words(weight.packed, fmt)
        made["weight_shape"] = lambda: torch.tensor(weight.shape)
    else:
        made["weight"] = lambda: weight.codes
    if zero_point is not None and isinstance(fmt, IntFormat):
        made["weight_zero_point"] = lambda: (
            zero_points_to_words(zero_point, fmt) if packed else flat(zero_point)
        )
    if input_scale is not None:
        made["input_scale"] = lambda: cast(input_scale.reshape(1))
    if input_zero_point is not None:
        made["input_zero_point"] = lambda: input_zero_point.reshape(1).to(torch.int8)
    return made
