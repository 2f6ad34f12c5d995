"""Measuring a model on windows of tokens, alone or against the float model."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.calibrate import TokenSet, evaluation_windows
from ptq.config import EvaluationConfig, make_section
from ptq.errors import CalibrationError
from ptq.evaluation.cached import CachedLogits
from ptq.evaluation.encoder import Similarity
from ptq.evaluation.images import ImageAgreement, ImageSet
from ptq.evaluation.kind import evaluated_as
from ptq.evaluation.logits import ReferenceLogits, window_logits
from ptq.evaluation.others import evaluate_other
from ptq.evaluation.result import Evaluation, Perplexity, Protocol
from ptq.evaluation.statistics import TokenStatistics, nll, ratio_interval
from ptq.kv_cache import CacheSize
from ptq.model import check_tokens, require_causal

Progress = Callable[[Iterable[int]], Iterable[int]]


def evaluate(
    model: nn.Module,
    data: str | os.PathLike[str] | Sequence[str] | TokenSet | ImageSet,
    *,
    tokenizer: Any = None,
    reference: nn.Module | ReferenceLogits | None = None,
    windows: int = 16,
    context: int = 512,
    through_cache: bool = False,
    progress: Progress = iter,
) -> Evaluation | Perplexity | Similarity | ImageAgreement:
    """Perplexity of a causal language model; with ``reference``, also its distance from it. Of an
    encoder of text, the similarity of its embeddings with those of ``reference``; of a classifier
    of images, the agreement with it. Which it is, is found from the model's architecture.

    Windows do not overlap, and the first token of each is not scored.

    Args:
        data: a file, a directory or a ``datasets`` id (several: a list), which needs
            ``tokenizer``; or tokens from :func:`ptq.calibrate.evaluation_windows`. For a classifier
            of images a folder of images, an image, or a ``datasets`` id.
        tokenizer: the tokenizer, or the image processor.
        reference: the float model, or its recorded logits of the same windows.
        windows: at most so many are scored; so many images. An encoder is measured on the first
            sentences of ``windows * context`` tokens.
        context: tokens a window; of a sentence at most.
        through_cache: the model reads its quantized cache (:func:`ptq.quantize_cache`), as when it
            generates; else the attention of a window sees float keys and values.

    Raises:
        CalibrationError: the data cannot be used.
        ConfigError: ``windows`` or ``context`` is out of range, or there is no quantized cache.
        UnsupportedError: a model has no next-token logits, and is of no other kind that can be
            evaluated.
    """
    kind = evaluated_as(model)
    if kind != "causal":
        return evaluate_other(kind, model, data, tokenizer, reference, windows, context, progress)
    if isinstance(data, ImageSet):
        raise CalibrationError(f"{type(model).__name__} takes text, not images")
    if not isinstance(data, TokenSet):
        if tokenizer is None:
            raise CalibrationError("evaluating on text needs a tokenizer: pass tokenizer=...")
        sources = [data] if isinstance(data, str | os.PathLike) else data
        config = make_section(
            EvaluationConfig,
            "evaluate",
            data=[os.fspath(source) for source in sources],
            windows=windows,
            context=context,
        )
        data = evaluation_windows(config, tokenizer)
    if reference is not None:
        return compare(model, data, reference, through_cache=through_cache, progress=progress)
    _check(model, data)
    cached = CachedLogits(model) if through_cache else None
    logits_of = cached or window_logits
    lengths = _scored(data)
    losses = torch.empty(sum(lengths))  # whole from the start, as in TokenStatistics
    places = torch.split(losses, lengths)
    for index in progress(range(len(data.sequences))):
        window = data.sequences[index]
        logits = logits_of(model, window)
        places[index].copy_(nll(logits, window[1:].to(logits.device)))
    perplexity = math.exp(losses.double().mean().item())
    size = None if cached is None else cached.size
    return Perplexity(perplexity, _protocol(data, None, model), size)


def compare(
    model: nn.Module,
    data: TokenSet,
    reference: nn.Module | ReferenceLogits,
    *,
    through_cache: bool = False,
    progress: Progress = iter,
) -> Evaluation:
    """Compare a model with the float model, window by window.

    Args:
        through_cache: as in :func:`evaluate`; of the model, not of the reference.

    Raises:
        ConfigError: there is no quantized cache.
        CalibrationError: a model cannot take the windows, or they differ in vocabulary.
        UnsupportedError: a model has no next-token logits.
    """
    _check(model, data)
    if isinstance(reference, nn.Module):
        _check(reference, data)
    cached = CachedLogits(model) if through_cache else None
    logits_of = cached or window_logits
    found = TokenStatistics(_scored(data))
    for index in progress(range(len(data.sequences))):
        window = data.sequences[index]
        logits = logits_of(model, window)
        expected = _reference_logits(reference, index, window, logits)
        if expected.shape != logits.shape:
            raise CalibrationError(
                f"the reference has a vocabulary of {expected.shape[1]}, the model one of "
                f"{logits.shape[1]}: they are not the same model"
            )
        found.add(expected, logits, window[1:].to(logits.device))
    float_dtype = reference.dtype if isinstance(reference, ReferenceLogits) else _dtype(reference)
    size = None if cached is None else cached.size
    return _result(found, _protocol(data, float_dtype, model), size)


def _check(model: nn.Module, data: TokenSet) -> None:
    require_causal(model)
    if isinstance(model, PreTrainedModel):
        check_tokens(model.config, data.sequences, f"evaluation text {', '.join(data.source)}")


def _scored(data: TokenSet) -> list[int]:
    """Tokens of each window that are scored: all but the first."""
    return [len(window) - 1 for window in data.sequences]


def _reference_logits(
    reference: nn.Module | ReferenceLogits, index: int, window: Tensor, like: Tensor
) -> Tensor:
    if isinstance(reference, ReferenceLogits):
        return reference[index].to(like.device)
    return window_logits(reference, window).to(like.device)


def _result(found: TokenStatistics, protocol: Protocol, cache: CacheSize | None) -> Evaluation:
    pairs = zip(found.quantized_nll, found.float_nll, strict=True)
    low, high = ratio_interval([q - f for q, f in pairs])
    before = torch.cat(found.float_nll).double().mean().item()
    after = torch.cat(found.quantized_nll).double().mean().item()
    divergence = torch.cat(found.divergence).double()
    return Evaluation(
        float_perplexity=math.exp(before),
        quantized_perplexity=math.exp(after),
        ratio=math.exp(after - before),
        ratio_low=low,
        ratio_high=high,
        kl_mean=divergence.mean().item(),
        kl_p50=_percentile(divergence, 0.5),
        kl_p90=_percentile(divergence, 0.9),
        kl_p95=_percentile(divergence, 0.95),
        kl_p99=_percentile(divergence, 0.99),
        kl_p999=_percentile(divergence, 0.999),
        kl_max=divergence.max().item(),
        top1_agreement=torch.cat(found.agreement).double().mean().item(),
        top5_agreement=torch.cat(found.top_agreement).double().mean().item(),
        protocol=protocol,
        cache=cache,
        tokens=found,
    )


def _percentile(values: Tensor, share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed (any count)."""
    rank = math.ceil(share * len(values))
    return values.kthvalue(max(1, rank)).values.item()


def _protocol(data: TokenSet, float_dtype: torch.dtype | None, model: nn.Module) -> Protocol:
    lengths = [len(window) for window in data.sequences]
    return Protocol(
        tokens_sha256=data.sha256,
        windows=len(lengths),
        context=max(lengths),
        stride=max(lengths),
        tokens_scored=sum(lengths) - len(lengths),
        float_dtype=None if float_dtype is None else _name(float_dtype),
        dtype=_name(_dtype(model)),
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
