"""How fast this machine is at the pieces of work of a run, measured in about a second.

The pieces are the model's own: its layers' shapes, its schemes, its attention. Large ones are cut
to some rows and counted up.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq.algorithms import round_to_nearest, with_static_input
from ptq.config import Scheme
from ptq.core import is_finite, product
from ptq.evaluation.statistics import TokenStatistics
from ptq.modules import QuantLinear
from ptq.observers import make_observer
from ptq.preflight.facts import Facts, LinearFacts

_AT_MOST = 1 << 21  # elements of a weight that is measured
_LARGE = 1 << 24  # float32 values that no cache holds
_ROUNDED = 1 << 22  # elements of a weight that is rounded: no cache holds its copies
_REPEATS = 3
_TOKENS = 512  # at most, at a time
_SENTENCE = 24  # tokens, of what encoders are evaluated on

Shape = tuple[int, int]


@dataclass(frozen=True)
class Rates:
    """Seconds; of one thread's processor time, or of the clock where there are several.

    Args:
        tokens: that the layers were measured with.
        linear: of each float layer, by (N, K), for that many tokens and for one.
        quantized: likewise by (N, K) and scheme.
        rounding: for one element of a weight, by scheme.
        attention: of one layer, for those tokens.
        statistics: comparing the logits of one token.
        checking: that one element of the float model is a number.
        observing: for one element of a calibrated input.
        element: a pass over one float32 element.
        hashing: SHA-256 of a byte, and writing it.
        streaming: reading a byte of memory, from no cache.
        small: an operation on one token, whose cost is the call.
        fast: of a float product where blocks are calibrated, as a share of its time elsewhere.
    """

    tokens: int
    linear: dict[Shape, tuple[float, float]]
    quantized: dict[tuple[Shape, str], tuple[float, float]]
    rounding: dict[str, float]
    attention: float
    statistics: float
    checking: float
    observing: float
    element: float
    hashing: float
    streaming: float
    small: float
    fast: float = 1.0


@torch.no_grad()
def measure_rates(facts: Facts) -> Rates:
    """Measure what this run will do."""
    tokens = _tokens(facts)
    linear, quantized, rounding = {}, {}, {}
    for layer in facts.linears:
        linear[layer.shape] = _linear(layer.shape, facts.float_dtype, tokens)
        if layer.scheme is not None:
            key = layer.shape, str(layer.scheme)
            quantized[key] = _quantized(layer, facts.output_dtype, tokens)
            rounding[key[1]] = _rounding(layer, facts.float_dtype)
    if facts.vocabulary:
        head = (facts.vocabulary, facts.hidden)
        linear.setdefault(head, _linear(head, facts.float_dtype, tokens))
        for key in [(head, "float")]:
            quantized[key] = _linear(head, facts.output_dtype, tokens)
    x, y = torch.randn(2, min(_AT_MOST, max(1 << 18, tokens * facts.inner)))
    large = torch.zeros(_LARGE)
    data = bytes(1 << 21)
    row = torch.randn(1, max(1, facts.hidden))
    return Rates(
        tokens,
        linear,
        quantized,
        rounding,
        _attention(facts, tokens),
        _statistics(facts),
        _checking(facts.float_dtype),
        _observing(facts),
        seconds(lambda: torch.mul(x, y)) / x.numel(),
        seconds(lambda: hashlib.sha256(data)) / len(data),
        seconds(lambda: large.sum()) / large.nbytes,
        seconds(lambda: [row * row for _ in range(100)]) / 100,
        _fast(facts, tokens),
    )


def seconds(work: Callable[[], object]) -> float:
    """The median of a few times, after one that does not count. The least would be that of a moment
    when other processes leave the memory alone, which a run does not have."""
    work()
    times = []
    for _ in range(_REPEATS):
        start = clock()
        work()
        times.append(clock() - start)
    return median(times)


def clock() -> float:
    """Processor time of one thread, which other processes do not change much; of several threads
    the time that passes."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _tokens(facts: Facts) -> int:
    evaluation, calibration = facts.config.evaluation, facts.config.calibration
    if evaluation is not None and not facts.vocabulary:
        return _SENTENCE
    if evaluation is not None:
        return min(_TOKENS, evaluation.context)
    if calibration is not None and facts.calibrates:
        return min(_TOKENS, calibration.sequence_length)
    return 64


def _cut(shape: Shape) -> tuple[int, float]:
    """Rows of a weight that are measured, and the factor that makes up for the rest."""
    rows = max(1, min(shape[0], _AT_MOST // shape[1]))
    return rows, shape[0] / rows


def _linear(shape: Shape, dtype: torch.dtype, tokens: int) -> tuple[float, float]:
    rows, factor = _cut(shape)
    weight = torch.randn(rows, shape[1]).to(dtype)
    x = torch.randn(tokens, shape[1]).to(dtype)
    one = x[:1]
    return (
        factor * seconds(lambda: F.linear(x, weight)),
        factor * seconds(lambda: F.linear(one, weight)),
    )


def _quantized(layer: LinearFacts, dtype: torch.dtype, tokens: int) -> tuple[float, float]:
    scheme = layer.scheme
    assert scheme is not None
    rows, factor = _cut(layer.shape)
    made = _layer(torch.randn(rows, layer.shape[1]), scheme)
    x = torch.randn(tokens, layer.shape[1]).to(dtype)
    one = x[:1]
    return factor * seconds(lambda: made(x)), factor * seconds(lambda: made(one))


def _rounding(layer: LinearFacts, dtype: torch.dtype) -> float:
    scheme = layer.scheme
    assert scheme is not None
    rows = max(1, min(layer.shape[0], _ROUNDED // layer.shape[1]))
    weight = torch.randn(rows, layer.shape[1]).to(dtype)
    return seconds(lambda: round_to_nearest(weight, scheme.weights)) / weight.numel()


def _layer(weight: Tensor, scheme: Scheme) -> nn.Module:
    codes = round_to_nearest(weight, scheme.weights)
    activations = scheme.activations
    if activations is not None and activations.mode == "static":
        codes = with_static_input(codes, activations, torch.tensor([-4.0]), torch.tensor([4.0]))
    return QuantLinear(codes, scheme)


def _attention(facts: Facts, tokens: int) -> float:
    if not facts.heads:
        return 0.0
    shape = (3, 1, facts.heads, tokens, facts.head_dim)
    q, k, v = torch.randn(shape).to(facts.float_dtype)
    return seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def _statistics(facts: Facts) -> float:
    rows = 16
    if not facts.vocabulary or facts.config.evaluation is None:
        return 0.0
    theirs, ours = torch.randn(2, rows, facts.vocabulary)
    targets = torch.zeros(rows, dtype=torch.int64)
    return seconds(lambda: TokenStatistics([rows]).add(theirs, ours, targets)) / rows


def _checking(dtype: torch.dtype) -> float:
    weight = torch.ones(_ROUNDED, dtype=dtype)
    return seconds(lambda: is_finite(weight)) / weight.numel()


def _observing(facts: Facts) -> float:
    section = facts.config.calibration
    cache = facts.config.kv_cache if facts.static_cache else None
    codes = facts.static or cache
    if codes is None or section is None:
        return 0.0
    rows = torch.randn(256, max(1, facts.hidden))
    per_channel = facts.static is None and cache is not None and cache.keys == "channel"
    observer = make_observer(section.observer, codes, rows.shape[1] if per_channel else None)
    return seconds(lambda: observer.update(rows)) / rows.numel()


def _fast(facts: Facts, tokens: int) -> float:
    if facts.recipe.plain or not facts.linears:
        return 1.0
    shape = max((layer.shape for layer in facts.linears), key=lambda s: s[0] * s[1])
    rows, _ = _cut(shape)
    weight = torch.randn(rows, shape[1]).to(facts.float_dtype)
    x = torch.randn(tokens, shape[1]).to(facts.float_dtype)
    return seconds(lambda: product(x, weight)) / seconds(lambda: F.linear(x, weight))
