"""One quantized layer as the tensors that GPTQ and AWQ store, and back; codes never change."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ptq.checkpoint.act_order import groups_of_inputs, in_groups, in_input_order, order_of
from ptq.checkpoint.foreign_read import FLOATS, Expected, finite
from ptq.checkpoint.foreign_write import Made, Values, lazily
from ptq.checkpoint.packed_int32.layouts import (
    codes_from_words,
    codes_to_words,
    fills_words,
    zeros_from_words,
    zeros_to_words,
)
from ptq.checkpoint.packed_int32.settings import LayoutName, Settings
from ptq.checkpoint.shard import dtype_name
from ptq.config import Scheme
from ptq.core import QuantizedWeight
from ptq.core.quantized_weight import SCALE_DTYPES
from ptq.errors import CheckpointError, UnsupportedError
from ptq.formats import IntFormat

SCALE_DTYPE = torch.float16
"""What the formats were made with; GPTQModel keeps bfloat16 as well, and vLLM takes it."""
KEPT_DTYPES = (torch.float16, torch.bfloat16)


def expected_tensors(
    settings: Settings, layout: LayoutName, shape: tuple[int, int], bias: bool
) -> dict[str, Expected]:
    """The tensors of a layer [N, K], by the last part of their names.

    Args:
        bias: the layer has one; else its tensor, which some writers fill with zeros, may be there.

    Raises:
        UnsupportedError: the sizes do not go with the bits or the group size.
    """
    rows, columns = shape
    bits, size = settings.bits, settings.group(columns) or columns
    if columns % size:
        raise UnsupportedError(
            f"its group size {size} does not divide its input size {columns}, which ptq cannot "
            "load; quantize again with a group size that does"
        )
    packed = rows if layout == "awq" else columns
    if not fills_words(rows, bits) or not fills_words(packed, bits):
        raise UnsupportedError(f"its sizes {list(shape)} do not fill words with {bits}-bit codes")
    words = rows * bits // 32
    across = (columns, words) if layout == "awq" else (columns * bits // 32, rows)
    found = {
        "qweight": Expected((torch.int32,), across),
        "qzeros": Expected((torch.int32,), (columns // size, words)),
        "scales": Expected(SCALE_DTYPES, (columns // size, rows)),
    }
    if layout != "awq":
        found["g_idx"] = Expected((torch.int32, torch.int64), (columns,), optional=True)
    if not bias:
        found["bias"] = Expected(FLOATS, (rows,), optional=True)
    return found


def read_weight(
    settings: Settings,
    layout: LayoutName,
    shape: tuple[int, int],
    tensors: Mapping[str, Tensor],
) -> tuple[QuantizedWeight, Scheme]:
    """The weight [N, K] of the tensors of one layer, which are as :func:`expected_tensors` says.

    It is symmetric if all its zero points are in the middle.

    Raises:
        CheckpointError: a scale is no number, a symmetric layer has other zero points, or the
            groups of act-order are not of one size.
        UnsupportedError: it has zero points that ptq cannot read.
    """
    rows, columns = shape
    size = settings.group(columns)
    order = order_of(tensors["g_idx"], size or columns) if "g_idx" in tensors else None
    scale = finite("scales", tensors["scales"]).t().contiguous()
    zeros = zeros_from_words(tensors["qzeros"], rows, layout, settings.bits)
    symmetric = not bool(zeros.any())
    if settings.symmetric and not symmetric:
        raise CheckpointError(
            "quantization_config says sym, but qzeros has zero points that are not in the middle, "
            "so that readers would not agree; the file is damaged, or checkpoint_format is another"
        )
    scheme = Scheme.model_validate(
        {
            "weights": {
                "format": f"int{settings.bits}",
                "symmetric": symmetric,
                "granularity": "channel" if size is None else "group",
                "group_size": size,
                "scale_dtype": dtype_name(scale.dtype),
                "signed_scale": symmetric and bool((scale < 0).any()),
            },
            "input_order": order is not None,
        }
    )
    fmt, gran = scheme.weights.int_format, scheme.weights.granularity_value
    packed = codes_from_words(tensors["qweight"], shape, layout, settings.bits)
    packed = in_groups(packed, columns, fmt, order)
    zero_point = None if symmetric else zeros
    return QuantizedWeight(packed, scale, zero_point, fmt, gran, shape, input_order=order), scheme


def stored_tensors(
    weight: QuantizedWeight, layout: LayoutName, scale_dtype: torch.dtype | None
) -> Made:
    """The tensors that the format stores of a weight.

    Args:
        scale_dtype: of the stored scales; None leaves them as they are.
    """
    return lazily(weight, lambda w: _values(w, layout, scale_dtype or w.scale.dtype))


def _values(
    weight: QuantizedWeight, layout: LayoutName, scale_dtype: torch.dtype
) -> dict[str, Values]:
    fmt, (_, columns) = weight.format, weight.shape
    assert isinstance(fmt, IntFormat)  # the writer has refused the others
    size, order = weight.granularity.group_size or columns, weight.input_order

    def zeros() -> Tensor:
        if weight.zero_point is not None:
            return weight.zero_point
        return torch.zeros_like(weight.scale, dtype=torch.int8)

    made: dict[str, Values] = {
        "qweight": lambda: codes_to_words(
            in_input_order(weight.packed, columns, fmt, order), columns, fmt, layout
        ),
        "qzeros": lambda: zeros_to_words(zeros(), fmt, layout),
        "scales": lambda: weight.scale.t().contiguous().to(scale_dtype),
    }
    if layout != "awq":
        made["g_idx"] = lambda: groups_of_inputs(order, columns, size)
    return made
