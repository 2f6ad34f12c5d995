"""Outlier tokens: those whose hidden states are many times larger than the others'.

The first token of a sequence often is one, as are delimiters (Sun et al. 2024, "Massive Activations
in Large Language Models", arXiv 2402.17762): a static range must hold them, and loses the others'
resolution to them.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ptq.sensitivity import InPlace

_SHOWN = 8


@dataclass(frozen=True)
class Token:
    """A token with outlying hidden states.

    Args:
        window, position: of the token; batches of several sequences count as several windows.
        text: as the tokenizer decodes it, or None without one.
        block: that makes the largest value.
        channel: of the hidden states, where it is.
        magnitude: its absolute value.
        ratio: to the median token's largest absolute value there.
    """

    window: int
    position: int
    id: int | None
    text: str | None
    block: str
    channel: int
    magnitude: float
    ratio: float


@torch.no_grad()
def outlier_tokens(in_place: InPlace, tokenizer: Any, ratio: float) -> tuple[Token, ...]:
    """The tokens with the largest ratios, at least ``ratio``; none where blocks are no chain."""
    chain = in_place.chain
    if chain is None:
        return ()
    best: dict[tuple[int, int, int], tuple[float, str, int, float]] = {}
    for place, block in enumerate(chain.names):
        for index, hidden in enumerate(in_place.stream_at(place + 1).hidden):
            if hidden.dim() != 3:
                continue
            size, channel = hidden.abs().float().max(-1)  # [B, T]
            mask = chain.masks[index]
            seen = size if mask is None else size[mask.to(size.device)]
            relative = size / seen.median().clamp(min=torch.finfo(torch.float32).tiny)
            if mask is not None:
                relative = relative * mask.to(size.device)
            for row, column in (relative > ratio).nonzero().tolist():
                found = relative[row, column].item()
                key = (index, row, column)
                if found > best.get(key, (0.0,))[0]:
                    at = (row, column)
                    best[key] = (found, block, int(channel[at]), size[at].item())
    order = sorted(best, key=lambda key: -best[key][0])[:_SHOWN]
    return tuple(_token(in_place, key, best[key], tokenizer) for key in order)


def _token(
    in_place: InPlace,
    key: tuple[int, int, int],
    found: tuple[float, str, int, float],
    tokenizer: Any,
) -> Token:
    index, row, position = key
    batch = in_place.batches[index]
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    token = None if ids is None else int(ids[row, position])
    text = None if tokenizer is None or token is None else tokenizer.decode([token])
    before = sum(_sequences(b) for b in in_place.batches[:index])
    ratio, block, channel, magnitude = found
    return Token(before + row, position, token, text, block, channel, magnitude, ratio)


def _sequences(batch: Any) -> int:
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    return 1 if ids is None else len(ids)
