"""The loop of GPTQ: columns are rounded one by one, and those that follow take up the error."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.algorithms.clip import ClipOptions, range_qparams, search_qparams
from ptq.config import WeightScheme
from ptq.core import QParams, product


@dataclass(eq=False)
class Codes:
    """Codes and scales in the layout of the work, [K, N]: a column of the weight is a row.

    Args:
        steps: float32 [K, N], whole: code minus zero point.
        scale: float32 [G, N], of values that the scheme's dtype can hold.
        zero_point: float32 [G, N].
    """

    steps: Tensor
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, qparams: QParams, rows: int, columns: int) -> "Codes":
        """No codes yet; a scale of the whole tensor is repeated for each row."""
        scale = qparams.scale.float().expand(rows, -1).T.contiguous()
        zero_point = torch.zeros_like(scale)
        if qparams.zero_point is not None:
            zero_point.copy_(qparams.zero_point.expand(rows, -1).T)
        return cls(scale.new_zeros(columns, rows), scale, zero_point)

    @property
    def group_size(self) -> int:
        return self.steps.shape[0] // self.scale.shape[0]

    def values(self) -> Tensor:
        """float32 [K, N]: what the codes stand for."""
        return self.steps * self.scale.repeat_interleave(self.group_size, 0)

    def qparams(self, scheme: WeightScheme) -> QParams:
        """Scale and zero point, shaped ``granularity.scale_shape``."""
        rows = 1 if scheme.granularity == "tensor" else self.scale.shape[1]
        zero_point = None
        if not scheme.symmetric:
            zero_point = self.zero_point[:, :rows].T.contiguous().to(scheme.int_format.dtype)
        scale = self.scale[:, :rows].T.contiguous()
        return QParams(scale.to(scheme.torch_scale_dtype), zero_point)


@dataclass(frozen=True, eq=False)
class Compensation:
    """What the loop needs to know.

    Args:
        scheme: of the codes.
        order: int64 [K], the columns in the order in which they are rounded; None: as they are.
        upper: float32 [K, K], see :class:`ptq.algorithms.hessian.Factor`.
        importance: float32 [K], the mean squares of the inputs, for the search of scales.
        search: the options of that search.
        block: columns between two updates of the rest.
        sequential: each group's scale is chosen when its first column is reached, from the weights
            as the errors so far have left them; needs the columns as they are.
    """

    scheme: WeightScheme
    order: Tensor | None
    upper: Tensor
    importance: Tensor
    search: ClipOptions
    block: int
    sequential: bool

    def run(self, target: Tensor) -> Codes:
        """Algorithm 1 of the paper, on float32 [N, K]."""
        rows, columns = target.shape
        if self.sequential:
            qparams = range_qparams(target, self.scheme)  # each is replaced on the way
        else:
            qparams = search_qparams(target, self.scheme, self.importance, self.search)
        codes = Codes.of(qparams, rows, columns)
        order = self._columns(target)
        work = target.T[order].contiguous()
        for start, end in self._blocks(columns, codes.group_size):
            if self.sequential and start % codes.group_size == 0:
                self._rescale(work, codes, start)
            errors = self._round_block(work[start:end], codes, order[start:end], start)
            work[end:] -= product(self.upper[start:end, end:].T, errors.T)
        steps = torch.empty_like(work)
        steps[order] = work
        codes.steps = steps
        return codes

    def _columns(self, target: Tensor) -> Tensor:
        if self.order is not None:
            return self.order
        return torch.arange(target.shape[1], device=target.device)

    def _blocks(self, columns: int, group_size: int) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the columns of each block. Where scales are chosen on the way, a
        group starts with a block, when its weights have taken up all errors before it."""
        start = 0
        while start < columns:
            end = min(start + self.block, columns)
            if self.sequential:
                end = min(end, (start // group_size + 1) * group_size)
            yield start, end
            start = end

    def _round_block(self, block: Tensor, codes: Codes, columns: Tensor, start: int) -> Tensor:
        """Put steps in the place of the weights of a block, [B, N], of these columns.

        Returns:
            [B, N]: what the columns after the block have to take up.
        """
        fmt, end = self.scheme.int_format, start + len(block)
        groups = columns // codes.group_size
        scale, zero_point = codes.scale[groups], codes.zero_point[groups]
        low, high = fmt.qmin - zero_point, fmt.qmax - zero_point
        upper = self.upper[start:end, start:end]
        pivots = upper.diagonal().unsqueeze(1)
        shares = upper / pivots
        made, errors = torch.empty_like(block), torch.empty_like(block)
        for i, (weight, step, least, most, steps, error) in enumerate(
            zip(block, scale, low, high, made, errors, strict=True), 1
        ):
            torch.div(weight, step, out=steps).round_().clamp_(least, most)
            torch.addcmul(weight, steps, step, value=-1, out=error)
            block[i:].addr_(shares[i - 1, i:], error, alpha=-1)
        block.copy_(made)
        return errors.div_(pivots)

    def _rescale(self, work: Tensor, codes: Codes, first: int) -> None:
        """Choose the scale of the group that starts at column ``first``."""
        part = slice(first, first + codes.group_size)
        weights, importance = work[part].T.contiguous(), self.importance[part]
        found = search_qparams(weights, self.scheme, importance, self.search)
        index = first // codes.group_size
        codes.scale[index] = found.scale[:, 0]
        if found.zero_point is not None:
            codes.zero_point[index] = found.zero_point[:, 0]
