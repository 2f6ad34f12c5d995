"""Comparing two models' predictions token by token, and what the differences say."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK = 64  # neighbouring tokens that count as one observation
TOP = 5  # likeliest tokens that are remembered
_ROWS = 64  # rows of float32 probabilities that exist at a time


class TokenStatistics:
    """What was measured of each scored token, window by window.

    All results have their place from the start: small tensors that came into being between large
    ones would keep freed memory from being used again, some 25 MB a window.

    Args:
        lengths: number of scored tokens of each window, in the order of :meth:`add`.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)
        total = sum(self._lengths)
        self._values = torch.full((5, total), torch.nan)
        self._top_ids = torch.full((2, total, TOP), -1, dtype=torch.int32)
        self._top_probabilities = torch.full((2, total, TOP), torch.nan)
        self._filled = 0

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Compare logits [T, V] of both models, some rows at a time, in float32.

        Divergence is KL(float || quantized) in nats.
        """
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            p = reference[rows].float().log_softmax(-1)
            q = logits[rows].float().log_softmax(-1)
            target = targets[rows, None]
            places = slice(self._filled, self._filled + len(target))
            found = self._values[:, places]
            found[0] = -p.gather(1, target)[:, 0]
            found[1] = -q.gather(1, target)[:, 0]
            # The sum is not negative but for rounding.
            found[2] = (p.exp() * (p - q)).sum(-1).clamp(min=0)
            found[3] = p.argmax(-1) == q.argmax(-1)
            found[4] = self._add_top(places, p, q)
            self._filled += len(target)

    def _add_top(self, places: slice, p: Tensor, q: Tensor) -> Tensor:
        """Remember the likeliest tokens of both; returns the share of p's that q has as well."""
        count = min(TOP, p.shape[1])
        for side, log_probabilities in enumerate((p, q)):
            values, ids = log_probabilities.topk(count)
            self._top_ids[side, places, :count] = ids.int()
            self._top_probabilities[side, places, :count] = values.exp()
        both = self._top_ids[:, places, :count]
        return (both[0, :, :, None] == both[1, :, None, :]).any(-1).float().mean(-1)

    @property
    def float_nll(self) -> tuple[Tensor, ...]:
        """Negative log-likelihood of each token under the float model, float32, by window."""
        return torch.split(self._values[0], self._lengths)

    @property
    def quantized_nll(self) -> tuple[Tensor, ...]:
        return torch.split(self._values[1], self._lengths)

    @property
    def divergence(self) -> tuple[Tensor, ...]:
        return torch.split(self._values[2], self._lengths)

    @property
    def agreement(self) -> tuple[Tensor, ...]:
        """1 where both rank the same token first, else 0."""
        return torch.split(self._values[3], self._lengths)

    @property
    def top_agreement(self) -> tuple[Tensor, ...]:
        """Share of the float model's five likeliest tokens that are among the quantized one's."""
        return torch.split(self._values[4], self._lengths)

    def likeliest(self, window: int) -> list[list[list[tuple[int, float]]]]:
        """Token id and probability of the likeliest tokens, by model (float, quantized) and
        scored token of a window; fewer than five where the vocabulary has no more."""
        ids = torch.split(self._top_ids, self._lengths, 1)[window].tolist()
        shares = torch.split(self._top_probabilities, self._lengths, 1)[window].tolist()
        return [
            [
                [pair for pair in zip(*token, strict=True) if pair[0] >= 0]
                for token in zip(ids[side], shares[side], strict=True)
            ]
            for side in range(2)
        ]


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood [T] of the targets, in float32, some rows at a time."""
    parts = [
        torch.nn.functional.cross_entropy(
            logits[i : i + _ROWS].float(), targets[i : i + _ROWS], reduction="none"
        )
        for i in range(0, len(targets), _ROWS)
    ]
    return torch.cat(parts)


def ratio_interval(differences: list[Tensor], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the perplexity ratio, from paired differences of each window.

    The differences (quantized minus float NLL) of ``BLOCK`` consecutive tokens are averaged, which
    takes most of the correlation between neighbours away; the blocks' mean has a Student t
    interval, and the ratio is its exponential. One block alone gives (0, inf).
    """
    blocks = torch.cat([_block_means(window.double()) for window in differences])
    count = len(blocks)
    if count < 2:
        return 0.0, math.inf
    mean = torch.cat(differences).double().mean().item()
    error = blocks.std().item() / math.sqrt(count)
    reach = student_t(0.5 + confidence / 2, count - 1) * error
    return math.exp(mean - reach), math.exp(mean + reach)


def _block_means(window: Tensor) -> Tensor:
    """Means of whole blocks; the tokens left over join the last one."""
    if len(window) < 2 * BLOCK:
        return window.mean()[None]
    whole = len(window) // BLOCK
    last = window[(whole - 1) * BLOCK :].mean()[None]
    return torch.cat((window[: (whole - 1) * BLOCK].view(-1, BLOCK).mean(1), last))


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution.

    Exact for one and two degrees of freedom, else the Cornish-Fisher expansion of Abramowitz and
    Stegun, 26.7.5 (within 1% from three degrees on at 97.5%).
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        alpha = 4 * probability * (1 - probability)
        return 2 * (probability - 0.5) * math.sqrt(2 / alpha)
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(degrees) ** (i + 1) for i, term in enumerate(terms))
