"""QuantizedWeight: the one representation of a quantized matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.core.affine import dequantize
from ptq.core.granularity import Granularity
from ptq.core.packing import pack, packed_width, unpack
from ptq.formats import Format, IntFormat

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight [N, K] with what is needed to read them.

    Args:
        packed: int8 [N, K] for 8-bit formats (the bytes of floating-point ones), else uint8
            [N, ceil(K * bits / 8)]; the layout is that of :mod:`ptq.core.packing`.
        scale: [N or 1, groups or 1], float32, float16 or bfloat16.
        zero_point: int8, shaped like ``scale``; None for a symmetric scheme.
        shape: (N, K).
        input_scale: float32 scalar, the static scale of the layer's input, or None.
        input_zero_point: int32 scalar, or None.
        input_order: int32 [K], a permutation: which input each column of the codes is for (GPTQ's
            act-order); None: the inputs are in order. What reads the codes is given the inputs in
            this order, and ``dequantize`` gives columns in it.

    Raises:
        ValueError: a shape or dtype breaks these rules.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: Format
    granularity: Granularity
    shape: tuple[int, int]
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    input_order: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        eight = self.format.bits == 8
        _check(
            "packed",
            self.packed,
            (rows, packed_width(columns, self.format.bits)),
            (torch.int8,) if eight else (torch.uint8,),
        )
        scale_shape = self.granularity.scale_shape(self.shape)
        _check("scale", self.scale, scale_shape, SCALE_DTYPES)
        if not self.format.signed:
            raise ValueError(f"weights have signed codes, not {self.format.name}")
        if self.zero_point is not None and not isinstance(self.format, IntFormat):
            raise ValueError(f"{self.format.name} codes have no zero point")
        if self.zero_point is not None:
            _check("zero_point", self.zero_point, scale_shape, (torch.int8,))
        if self.input_scale is not None:
            _check("input_scale", self.input_scale, (), (torch.float32,))
        if self.input_zero_point is not None:
            _check("input_zero_point", self.input_zero_point, (), (torch.int32,))
        if self.input_order is not None:
            _check("input_order", self.input_order, (columns,), (torch.int32,))

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        fmt: Format,
        granularity: Granularity,
    ) -> "QuantizedWeight":
        """Pack codes [N, K] in ``fmt.dtype`` and hold them."""
        shape = (codes.shape[0], codes.shape[1])
        return cls(pack(codes, fmt), scale, zero_point, fmt, granularity, shape)

    @property
    def codes(self) -> Tensor:
        """The unpacked codes [N, K] in ``format.dtype``: int8 but for floating-point formats."""
        return unpack(self.packed, self.shape[1], self.format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight [N, K] that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero_point, self.granularity, dtype)

    def sorted(self, columns: Tensor) -> Tensor:
        """Columns [..., K] that are those of the inputs, in the order of the codes."""
        return columns if self.input_order is None else columns[..., self.input_order.long()]

    def restored(self, columns: Tensor) -> Tensor:
        """The inverse of :meth:`sorted`: columns of the codes, in the order of the inputs."""
        if self.input_order is None:
            return columns
        return columns[..., torch.argsort(self.input_order)]

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors held."""
        tensors = (
            self.packed,
            self.scale,
            self.zero_point,
            self.input_scale,
            self.input_zero_point,
            self.input_order,
        )
        return sum(t.nbytes for t in tensors if t is not None)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, "
            f"expected {wanted} {list(shape)}"
        )
