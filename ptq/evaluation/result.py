"""Results of an evaluation, with the protocol that they were measured by."""

import html
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ptq.evaluation.statistics import TokenStatistics
from ptq.kv_cache import CacheSize


@dataclass(frozen=True)
class Protocol:
    """How the figures were measured; two evaluations compare only if this is equal.

    Args:
        tokens_sha256: hash of the token ids.
        windows: number of windows scored, without overlap.
        context: tokens a window; the first of each is not scored.
        stride: tokens from the start of one window to the next.
        float_dtype: dtype of the float model (None: there was none).
        dtype: dtype of the parameters that are float in the measured model.
    """

    tokens_sha256: str
    windows: int
    context: int
    stride: int
    tokens_scored: int
    float_dtype: str | None
    dtype: str
    arithmetic: str = "log-softmax in float32, summed in float64"
    interval: str = "95%, paired, Student t over blocks of 64 tokens"


@dataclass(frozen=True)
class Evaluation:
    """Float against quantized on the same tokens.

    Args:
        ratio: quantized over float perplexity, with its 95% confidence interval.
        kl_mean, kl_p50 ... kl_p999, kl_max: KL(float || quantized) in nats, over the scored
            tokens: its mean, percentiles (p999 is the 99.9th) and maximum.
        top1_agreement: share of tokens where both models rank the same token first.
        top5_agreement: share of the float model's five likeliest tokens that are among the
            quantized one's five, over the scored tokens.
        cache: what the quantized cache held at the end of a window; None if none was read.
        tokens: what was measured of each token; not part of :meth:`to_dict`.
    """

    float_perplexity: float
    quantized_perplexity: float
    ratio: float
    ratio_low: float
    ratio_high: float
    kl_mean: float
    kl_p50: float
    kl_p90: float
    kl_p95: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1_agreement: float
    top5_agreement: float
    protocol: Protocol
    cache: CacheSize | None = None
    tokens: TokenStatistics | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an interval without an upper end has None there."""
        found = asdict(replace(self, tokens=None))
        del found["tokens"]
        found["ratio_high"] = self.ratio_high if math.isfinite(self.ratio_high) else None
        return _with_cache(found, self.cache)

    def _rows(self) -> list[tuple[str, str]]:
        p = self.protocol
        return [
            (f"perplexity, float ({p.float_dtype})", f"{self.float_perplexity:.3f}"),
            (f"perplexity, quantized ({p.dtype})", f"{self.quantized_perplexity:.3f}"),
            ("ratio [95%]", f"{self.ratio:.4f} [{self.ratio_low:.4f}, {self.ratio_high:.4f}]"),
            ("KL divergence, mean", f"{self.kl_mean:.5f} nats"),
            ("KL divergence, median", f"{self.kl_p50:.5f} nats"),
            ("KL divergence, 99th percentile", f"{self.kl_p99:.4f} nats"),
            ("KL divergence, largest", f"{self.kl_max:.4f} nats"),
            ("top-1 agreement", f"{100 * self.top1_agreement:.2f}%"),
            ("top-5 agreement", f"{100 * self.top5_agreement:.2f}%"),
            ("tokens scored", f"{p.tokens_scored:,} in {p.windows} windows of {p.context}"),
            *_cache_row(self.cache),
        ]

    def __str__(self) -> str:
        return as_text(self._rows())

    def _repr_html_(self) -> str:
        return as_table(self._rows())


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model."""

    perplexity: float
    protocol: Protocol
    cache: CacheSize | None = None

    def to_dict(self) -> dict[str, Any]:
        return _with_cache(asdict(self), self.cache)

    def _rows(self) -> list[tuple[str, str]]:
        p = self.protocol
        return [
            (f"perplexity ({p.dtype})", f"{self.perplexity:.3f}"),
            ("tokens scored", f"{p.tokens_scored:,} in {p.windows} windows of {p.context}"),
            *_cache_row(self.cache),
        ]

    def __str__(self) -> str:
        return as_text(self._rows())

    def _repr_html_(self) -> str:
        return as_table(self._rows())


def _with_cache(found: dict[str, Any], cache: CacheSize | None) -> dict[str, Any]:
    """The dictionary with the cache's figures, where one was read."""
    del found["cache"]
    return found if cache is None else {**found, "cache": cache.to_dict()}


def _cache_row(cache: CacheSize | None) -> list[tuple[str, str]]:
    return [] if cache is None else [("read from the quantized cache", str(cache))]


def as_text(rows: list[tuple[str, str]]) -> str:
    """Labels and values, aligned."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in rows)


def as_table(rows: list[tuple[str, str]]) -> str:
    """Labels and values as an HTML table."""
    cells = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{html.escape(value)}</td></tr>"
        for label, value in rows
    )
    return f"<table>{cells}</table>"
