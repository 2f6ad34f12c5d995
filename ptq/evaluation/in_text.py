"""Divergence where it happened: tokens in the text that they are part of."""

from collections.abc import Sequence
from typing import Any

import torch

from ptq.calibrate import TokenSet
from ptq.evaluation.statistics import TokenStatistics

_BEFORE = 24  # tokens of text before one that is shown
_BROKEN = "\ufffd"  # what decoders give for a part of a character


def tokens_in_text(
    found: TokenStatistics, data: TokenSet, tokenizer: Any, *, worst: int = 20
) -> dict[str, Any]:
    """The tokens where the models differ most, and whole windows with each token's divergence.

    Args:
        found: the statistics of a comparison on ``data``.
        worst: how many tokens.

    Returns:
        For JSON: ``windows``, the one with the median and the one with the largest mean (pieces of
        text and KL in nats for each token, None for the first, which is not scored); and
        ``worst``, the largest KL first (the text before, the token that follows there, what both
        models held likely instead, and how many ``times`` the like was met).
    """
    means = torch.stack([values.mean() for values in found.divergence])
    order = means.argsort(descending=True).tolist()
    shown = {order[len(order) // 2]: "median", order[0]: "largest"}
    return {
        "windows": [
            {
                "index": index,
                "why": why,
                "mean_kl": _short(means[index].item()),
                "pieces": pieces(tokenizer, data.sequences[index].tolist()),
                "kl": [None, *map(_short, found.divergence[index].tolist())],
            }
            for index, why in shown.items()
        ],
        "worst": [
            {**_token(found, data, tokenizer, window, scored), "times": times}
            for (window, scored), times in _worst(found, data, worst).items()
        ],
    }


def _worst(found: TokenStatistics, data: TokenSet, count: int) -> dict[tuple[int, int], int]:
    """Window and place of the scored tokens with the largest divergence, and how many places like
    it (the same token after the same four) were passed over on the way."""
    divergence = torch.cat(found.divergence)
    chosen: dict[tuple[int, ...], tuple[int, int]] = {}
    times: dict[tuple[int, int], int] = {}
    for index in divergence.argsort(descending=True, stable=True).tolist():
        window, scored = _place(found, index)
        end = scored + 2  # the first token is not scored
        same = tuple(data.sequences[window][max(0, end - 5) : end].tolist())
        if same not in chosen and len(chosen) == count:
            break
        place = chosen.setdefault(same, (window, scored))
        times[place] = times.get(place, 0) + 1
    return times


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; together they are the text.

    A token that ends within a character adds nothing, the one that completes it all of it (as
    text-generation-inference decodes a stream).
    """
    made: list[str] = []
    start = end = 0  # decoded together with what follows, as decoders look at their neighbours
    for index in range(len(ids)):
        before = _decode(tokenizer, ids[start:end])
        now = _decode(tokenizer, ids[start : index + 1])
        last = index + 1 == len(ids)
        if last or (len(now) > len(before) and not now.endswith(_BROKEN)):
            made.append(now[len(before) :])
            start, end = end, index + 1
        else:
            made.append("")
    return made


def _place(found: TokenStatistics, index: int) -> tuple[int, int]:
    """Window, and position in it, of the index-th scored token."""
    for window, values in enumerate(found.divergence):
        if index < len(values):
            return window, index
        index -= len(values)
    raise IndexError(index)


def _token(
    found: TokenStatistics, data: TokenSet, tokenizer: Any, window: int, scored: int
) -> dict[str, Any]:
    position = scored + 1  # the first token is not scored
    ids = data.sequences[window].tolist()
    context = ids[max(0, position - _BEFORE) : position]
    float_top, quantized_top = found.likeliest(window)
    return {
        "window": window,
        "position": position,
        "kl": _short(found.divergence[window][scored].item()),
        "before": _decode(tokenizer, context),
        "token": _following(tokenizer, context, ids[position]),
        "float_probability": _short(found.float_nll[window][scored].neg().exp().item()),
        "quantized_probability": _short(found.quantized_nll[window][scored].neg().exp().item()),
        "float": _choices(tokenizer, context, float_top[scored]),
        "quantized": _choices(tokenizer, context, quantized_top[scored]),
    }


def _choices(
    tokenizer: Any, context: list[int], likeliest: list[tuple[int, float]]
) -> list[dict[str, Any]]:
    return [
        {"token": _following(tokenizer, context, token), "probability": _short(probability)}
        for token, probability in likeliest
    ]


def _following(tokenizer: Any, context: list[int], token: int) -> str:
    """The text of a token where it follows others, with the space before it if it has one."""
    before = _decode(tokenizer, context[-4:])
    both = _decode(tokenizer, [*context[-4:], token])
    alone = not both.startswith(before) or both == before
    return _decode(tokenizer, [token]) if alone else both[len(before) :]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def _short(value: float) -> float:
    """Four significant digits: more are noise."""
    return float(f"{value:.4g}")
