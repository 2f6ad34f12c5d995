"""Timing the float and the quantized model against each other, in one process, taking turns."""

import time
from collections.abc import Iterable
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from ptq.evaluation.logits import Progress
from ptq.model import eval_mode

_NEW = 16  # tokens decoded in a turn
_BEFORE = 16  # tokens that they follow


@torch.no_grad()
def race(
    reference: nn.Module,
    model: nn.Module,
    window: Tensor,
    *,
    turns: int = 7,
    progress: Progress = iter,
) -> dict[str, Any]:
    """Seconds of both models for a prompt and for decoding, batch 1, eager.

    Each model runs once before anything is timed, and then once a turn; a ratio is of one turn,
    which is what makes it hold on a busy machine.

    Args:
        reference: the float model.
        window: token ids [T]: the prompt; decoding goes on after its first 16 tokens.

    Returns:
        ``turns``, and for ``prompt`` (all tokens) and ``decode`` (a token): ``tokens``, the median
        ``float_seconds`` and ``quantized_seconds``, and ``speed``: the median ratio of the times,
        with the 10th and 90th percentile of the turns as ``speed_low`` and ``speed_high``.
    """
    models = reference, model
    times: dict[str, list[list[float]]] = {"prompt": [[], []], "decode": [[], []]}
    with eval_mode(reference), eval_mode(model):
        for turn in progress(range(turns + 1)):
            for side in _order(turn):
                prompt, decode = _prompt(models[side], window), _decode(models[side], window)
                if turn:
                    times["prompt"][side].append(prompt)
                    times["decode"][side].append(decode)
    tokens = {"prompt": len(window), "decode": _NEW}
    found = {kind: {"tokens": tokens[kind], **_ratio(*times[kind])} for kind in times}
    return {"turns": turns, **found}


def _order(turn: int) -> Iterable[int]:
    """What ran before decides what is in the caches."""
    return (0, 1) if turn % 2 else (1, 0)


def _prompt(model: Any, window: Tensor) -> float:
    ids = window[None].to(next(model.parameters()).device)
    start = _now(ids)
    model(input_ids=ids, use_cache=False)
    return _now(ids) - start


def _decode(model: Any, window: Tensor) -> float:
    """Seconds a token."""
    ids = window[None, :_BEFORE].to(next(model.parameters()).device)
    output = model(input_ids=ids, use_cache=True)
    start = _now(ids)
    for _ in range(_NEW):
        ids = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
    return (_now(ids) - start) / _NEW


def _now(like: Tensor) -> float:
    """Seconds; what the device was asked for is done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def _ratio(reference: list[float], quantized: list[float]) -> dict[str, float]:
    ratios = [f / q for f, q in zip(reference, quantized, strict=True)]
    deciles = quantiles(ratios, n=10, method="inclusive")
    return {
        "float_seconds": median(reference),
        "quantized_seconds": median(quantized),
        "speed": median(ratios),
        "speed_low": deciles[0],
        "speed_high": deciles[-1],
    }
