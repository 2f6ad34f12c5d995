"""QuantEmbedding: a table of embeddings whose buffers are the canonical quantized weight."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq.config import Scheme
from ptq.core import QuantizedWeight
from ptq.modules.buffers import empty_weight, held_weight, kept_scales, register


class QuantEmbedding(nn.Module):
    """Rows of W by their number, W stored as integer codes; only the rows asked for are decoded.

    As in :class:`~ptq.modules.QuantLinear`, ``state_dict()`` is what a checkpoint holds, and codes
    and scales keep their dtypes. For inference: no gradient flows to the codes.

    Args:
        weight: the quantized table [num_embeddings, embedding_dim].
        scheme: the scheme it was quantized with; weight-only.
        dtype: of the output; ``.to(dtype)`` changes it.
        padding_idx: carried along; it only says which row is never trained.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        scheme: Scheme,
        dtype: torch.dtype,
        padding_idx: int | None = None,
    ):
        super().__init__()
        assert scheme.activations is None, "rows are looked up, not multiplied"
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.scheme = scheme
        register(self, weight)
        like = torch.empty(0, dtype=dtype, device=weight.packed.device)
        self.like = nn.Parameter(like, requires_grad=False)
        """No elements: its dtype is the output's, and follows casts and checkpoints."""

    @classmethod
    def on_meta(
        cls, num_embeddings: int, embedding_dim: int, scheme: Scheme, dtype: torch.dtype
    ) -> "QuantEmbedding":
        """An empty table of the right shapes and dtypes on the meta device, to be loaded into."""
        return cls(empty_weight(num_embeddings, embedding_dim, scheme), scheme, dtype)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The buffers as a value; nothing is copied."""
        return held_weight(self, self.scheme, (self.num_embeddings, self.embedding_dim))

    @property
    def weight(self) -> Tensor:
        """The float table [num_embeddings, embedding_dim], dequantized anew at every access."""
        return self.quantized_weight.dequantize(self.like.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Integers [...] to rows [..., embedding_dim].

        Raises:
            IndexError: an id is negative or not below ``num_embeddings`` (on a CPU).
        """
        wanted = ids.reshape(-1)
        table = self.quantized_weight
        per_row = table.granularity.kind != "tensor"
        rows = replace(
            table,
            packed=table.packed.index_select(0, wanted),
            scale=table.scale.index_select(0, wanted) if per_row else table.scale,
            zero_point=table.zero_point.index_select(0, wanted)
            if per_row and table.zero_point is not None
            else table.zero_point,
            shape=(wanted.shape[0], self.embedding_dim),
        )
        return rows.dequantize(self.like.dtype).reshape(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantEmbedding":
        """``.to()``, ``.half()``, ``.cuda()``: scales follow the device but keep their dtype."""
        with kept_scales(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"
