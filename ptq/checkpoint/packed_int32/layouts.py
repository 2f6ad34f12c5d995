"""The layouts of the tensors, each as its definition says it. N = out, K = in, G groups of a row.

Codes and zero points are stored without sign, u = q + 2^(b-1), and W = (u - u_zero) * scale.

=========  =======================================  =========================================
tensor     GPTQ (AutoGPTQ, GPTQModel)               AWQ (AutoAWQ's GEMM)
=========  =======================================  =========================================
qweight    int32 [K b/32, N]: along K               int32 [K, N/8]: along N, nibbles in the
                                                    order of ``_ORDER``
qzeros     int32 [G, N b/32]: along N; version 1    int32 [G, N/8]: as qweight
           stores one less
scales     [G, N]                                   [G, N]
g_idx      int32 [K]: the group of each input       none
=========  =======================================  =========================================

Within a row, code j has the bits from j b, counted from the low end of its first word.
"""

from torch import Tensor

from ptq.checkpoint.compressed_tensors.words import from_words, to_words
from ptq.checkpoint.packed_int32.settings import LayoutName
from ptq.core import pack, unpack
from ptq.errors import UnsupportedError
from ptq.formats import IntFormat

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of each nibble of a word, in AWQ."""
_PLACE = tuple(_ORDER.index(column) for column in range(8))


def fills_words(count: int, bits: int) -> bool:
    """Whether this many codes fill whole words, which the layouts have no padding for."""
    return count * bits % 32 == 0


def codes_to_words(packed: Tensor, columns: int, fmt: IntFormat, layout: LayoutName) -> Tensor:
    """``packed`` of a QuantizedWeight [N, K] as qweight."""
    if layout != "awq":
        return to_words(packed, fmt).t().contiguous()
    return _shuffled(unpack(packed, columns, fmt).t(), fmt)


def codes_from_words(
    words: Tensor, shape: tuple[int, int], layout: LayoutName, bits: int
) -> Tensor:
    """The inverse of :func:`codes_to_words`, for a weight of this shape."""
    rows, columns = shape
    fmt = IntFormat(bits, signed=True)
    if layout != "awq":
        return from_words(words.t(), columns, fmt)
    return pack(_restored(words, rows, fmt).t().contiguous(), fmt)


def zeros_to_words(zero_point: Tensor, fmt: IntFormat, layout: LayoutName) -> Tensor:
    """Zero points int8 [N, G] as qzeros; version 1 cannot hold the smallest one."""
    across = zero_point.t()
    if layout == "awq":
        return _shuffled(across, fmt)
    return to_words(pack((across - int(layout == "gptq")).contiguous(), fmt), fmt)


def zeros_from_words(words: Tensor, rows: int, layout: LayoutName, bits: int) -> Tensor:
    """The inverse of :func:`zeros_to_words`: int8 [rows, G].

    Raises:
        UnsupportedError: version 1 stores the largest value, which some writers mean as 0 and some
            readers take for 2^b.
    """
    fmt = IntFormat(bits, signed=True)
    if layout == "awq":
        return _restored(words, rows, fmt).t().contiguous()
    stored = unpack(from_words(words, rows, fmt), rows, fmt).t().contiguous()
    if layout == "gptq-v2":
        return stored
    if bool((stored == fmt.qmax).any()):
        raise UnsupportedError(
            f"qzeros holds {(1 << bits) - 1}, one less than a zero point, which some readers take "
            f"for {1 << bits} and others for 0; write it as gptq_v2, which has no such value"
        )
    return stored + 1


def _shuffled(codes: Tensor, fmt: IntFormat) -> Tensor:
    """int8 [R, N] as words [R, N / 8] in AWQ's order."""
    rows, columns = codes.shape
    nibbles = codes.reshape(rows, columns // 8, 8)[..., list(_ORDER)].reshape(rows, columns)
    return to_words(pack(nibbles, fmt), fmt)


def _restored(words: Tensor, columns: int, fmt: IntFormat) -> Tensor:
    """The inverse of :func:`_shuffled`."""
    nibbles = unpack(from_words(words, columns, fmt), columns, fmt)
    rows = nibbles.shape[0]
    return nibbles.reshape(rows, columns // 8, 8)[..., list(_PLACE)].reshape(rows, columns)
