"""How far a model's outputs are from those that the float model gave."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.errors import UnsupportedError
from ptq.model import require_causal

Measure = Literal["kl_nats", "output_error"]
_ROWS = 64  # rows of float32 probabilities that exist at a time
_FAR = 10.0  # nats


def measure_of(model: nn.Module) -> Measure:
    """``kl_nats`` of a causal language model of transformers, ``output_error`` of any other."""
    try:
        require_causal(model)
    except UnsupportedError:
        return "output_error"
    return "kl_nats" if isinstance(model, PreTrainedModel) else "output_error"


class Distances:
    """The float model's outputs, batch by batch, and the distance of others from them.

    ``kl_nats``: KL(float || other) of the next token's distribution, over the tokens that have a
    next one; padding has none. ``output_error``: the squared difference of all floating-point
    outputs, relative to their squared size; padded positions of outputs [B, T, ...] are left out.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self._kept: list[list[Tensor]] = []
        self._masks: list[Tensor | None] = []

    def remember(self, output: Any, mask: Tensor | None) -> None:
        """Keep what the float model gave for the next batch.

        Args:
            mask: bool [B, T], false where padded, or None.
        """
        self._masks.append(mask)
        self._kept.append(list(self._compared(output, len(self._kept))))

    def of(self, output: Any, index: int) -> float:
        """The distance of another output for a batch, summed: divided by :attr:`size`, all batches
        together make the mean."""
        pairs = zip(self._compared(output, index), self._kept[index], strict=True)
        if self.measure == "kl_nats":
            return sum(divergence(reference, other).sum().item() for other, reference in pairs)
        return sum((a.double() - b.double()).square().sum().item() for a, b in pairs)

    @property
    def count(self) -> int:
        """Rows that are compared."""
        return sum(tensor.shape[:1].numel() for kept in self._kept for tensor in kept)

    @property
    def size(self) -> float:
        """Number of predictions (``kl_nats``), or the float outputs' squared size."""
        if self.measure == "kl_nats":
            return float(self.count)
        every = (tensor for kept in self._kept for tensor in kept)
        return sum(tensor.double().square().sum().item() for tensor in every)

    def _compared(self, output: Any, index: int) -> Iterator[Tensor]:
        mask = self._masks[index]
        if self.measure == "kl_nats":
            logits: Tensor = output.logits
            kept = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask
            yield logits[:, :-1][(kept[:, 1:] & kept[:, :-1]).to(logits.device)]
            return
        for tensor in _floating(output):
            fits = mask is not None and tensor.shape[:2] == mask.shape
            yield tensor[mask.to(tensor.device)] if fits and mask is not None else tensor


def _floating(output: Any) -> Iterator[Tensor]:
    """All floating-point tensors in what a model returned, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _floating(value)


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || other) of each row of logits [R, V], in nats, float32 [R].

    As the sum of ``p (e^d - 1 - d)`` with ``d = log q - log p``, whose terms are none of them
    negative: a rounding error in the normalization of q, which the plain sum has in full, is
    multiplied by d, so that the divergence of nearly equal rows keeps its digits.
    """
    found = torch.empty(len(logits))
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, log_q = (x[rows].float().log_softmax(-1) for x in (reference, logits))
        p, d = log_p.exp(), log_q - log_p
        terms = (torch.expm1(d) - d).mul_(p)
        if bool((d > _FAR).any()):  # e^d may be more than float32 holds; p e^d is q
            terms = torch.where(d > _FAR, log_q.exp() - p - p * d, terms)
        found[rows] = terms.sum(-1)
    return found.clamp_(min=0)
