"""Peak memory of a run: what each stage holds, as a sum of named terms."""

from dataclasses import dataclass

import torch

from ptq.kernels import LinearSpec, select
from ptq.preflight.facts import Facts

_LATER = 30_000_000  # tokenizer, and libraries that load as they are needed
_STATISTIC_ROWS = 64  # of float32 probabilities at a time, some five copies of them
_MOMENT_ROWS = 2048  # that wait to be multiplied
_FEW_ROWS = 15  # of transformers' example, on which the model read back is compared
_FLOATS_AT_ONCE = 5 << 22  # float32 values that rounding holds of a weight

Terms = dict[str, int]


@dataclass(frozen=True)
class Stage:
    """What a stage of the run holds at its height.

    Args:
        terms: bytes, by what they are.
    """

    name: str
    terms: Terms

    @property
    def total(self) -> int:
        return sum(self.terms.values())


def memory_stages(facts: Facts, process: int) -> list[Stage]:
    """Every stage of a run, in order.

    Args:
        process: resident bytes of the process now, before anything is loaded.
    """
    base = {"process and libraries": process + _LATER}
    before = {**base, "float model": _held_float(facts)}
    after = {**base, **_held_quantized(facts)}
    stages = [Stage("load", {**base, **_load(facts)})]
    if facts.config.evaluation is not None:
        stages.append(Stage("evaluate float", {**before, **_float_logits(facts)}))
    stages.append(Stage("quantize", {**before, **_quantize(facts)}))
    after["kernels' forms of the weights"] = _forms(facts)
    if facts.static_cache:
        stages.append(Stage("calibrate the cache", {**after, **_cache_calibration(facts)}))
    again = 0 if facts.streamed else facts.quantized_bytes + _forms(facts)
    stages.append(Stage("read back", {**after, "the model read back": again}))
    if facts.config.evaluation is not None:
        stages.append(Stage("evaluate quantized", {**after, **_both_logits(facts)}))
    return stages


def _held_float(facts: Facts) -> int:
    if not facts.streamed:
        return facts.float_bytes
    block = facts.block_elements * facts.float_dtype.itemsize
    return facts.outside_bytes + block


def _held_quantized(facts: Facts) -> Terms:
    """What is quantized has memory of its own; what stays float and is not cast remains in the
    mapped files of the float model, which count as a whole then."""
    if facts.streamed:  # finished blocks are in files
        return {"what is outside the blocks": facts.outside_bytes}
    mapped = not facts.source.gguf and not facts.streamed
    if not mapped or facts.output_dtype != facts.float_dtype:
        return {"quantized model": facts.quantized_bytes}
    codes = sum(layer.bytes_after for layer in facts.plan.quantized)
    return {"quantized layers": codes, "the float model's file": facts.float_bytes}


def _forms(facts: Facts) -> int:
    """What the kernels for a few rows keep beside the weights, once the model has run."""
    if facts.streamed:  # it does not run
        return 0
    total = 0
    for layer in facts.quantized_linears:
        assert layer.scheme is not None
        weights = layer.scheme.weights
        spec = LinearSpec(
            "cpu",
            facts.output_dtype,
            weights.number_format,
            weights.granularity_value,
            weights.symmetric,
            layer.scheme.activations,
            *layer.shape,
            m=_FEW_ROWS,
        )
        total += layer.count * select(spec).extra_bytes(spec)
    return total


def _load(facts: Facts) -> Terms:
    if facts.streamed:  # the mapped file, what is read of it, and its conversion
        return {"what is outside the blocks, three times": 3 * facts.outside_bytes}
    terms = {"float model": _held_float(facts)}
    if facts.source.gguf:
        terms["a tensor while it is dequantized, twice"] = 2 * 4 * facts.largest
    return terms


def _float_logits(facts: Facts) -> Terms:
    section = facts.config.evaluation
    assert section is not None
    if not facts.vocabulary:
        return {"activations": _activations(facts, 1, section.context)}
    logits = section.context * facts.vocabulary * facts.float_dtype.itemsize
    return {
        "logits of two windows": 2 * logits,
        "activations": _activations(facts, 1, section.context),
    }


def _both_logits(facts: Facts) -> Terms:
    section = facts.config.evaluation
    assert section is not None
    if not facts.vocabulary:
        return {"activations": _activations(facts, 1, section.context)}
    count = section.context * facts.vocabulary
    terms = {
        "float logits of a window": count * facts.float_dtype.itemsize,
        "logits of two windows": 2 * count * facts.output_dtype.itemsize,
    }
    rows = 5 * _STATISTIC_ROWS * facts.vocabulary * 4
    if facts.output_dtype != torch.float32:  # their sum is made in float32
        terms["a window's logits in float32"] = max(count * 4, rows)
    else:
        terms["probabilities of some rows"] = rows
    return terms


def _activations(facts: Facts, batch: int, length: int) -> int:
    """Of one block at a time: queries, keys, values and scores or the inner layer's, whichever are
    more."""
    tokens = batch * length
    inner = 4 * tokens * facts.inner
    attention = 6 * tokens * facts.hidden + batch * facts.heads * length * length
    return max(inner, attention) * facts.float_dtype.itemsize


def _quantize(facts: Facts) -> Terms:
    if facts.recipe.plain:
        if facts.static is None:
            return {"a layer while it is rounded": _rounding(facts)}
        return _calibration(facts)
    return _blockwise(facts)


def _rounding(facts: Facts) -> int:
    most = max((n * k for n, k in (x.shape for x in facts.quantized_linears)), default=0)
    return 4 * min(5 * most, _FLOATS_AT_ONCE)


def _calibration(facts: Facts) -> Terms:
    """A batch runs through the whole model, its output head included."""
    batch, length = max(facts.padded_batches, key=lambda b: b[0] * b[1])
    logits = batch * length * facts.vocabulary * facts.float_dtype.itemsize
    return {
        "logits of a calibration batch": logits,
        "activations of a calibration batch": _activations(facts, batch, length),
    }


def _cache_calibration(facts: Facts) -> Terms:
    """A batch runs through the quantized model, whose cache holds it in float; its logits are not
    made."""
    batch, length = max(facts.padded_batches, key=lambda b: b[0] * b[1])
    states = 2 * facts.blocks * facts.kv_heads * facts.head_dim * facts.float_dtype.itemsize
    return {
        "activations of a calibration batch": _activations(facts, batch, length),
        "its keys and values": batch * length * states,
    }


def _blockwise(facts: Facts) -> Terms:
    length, samples = max(facts.calibration_lengths), len(facts.calibration_lengths)
    followed = 2 if facts.recipe.needs_targets else 1
    hidden = facts.calibration_tokens * facts.hidden * facts.float_dtype.itemsize
    terms = {
        "activations of a sequence": _activations(facts, 1, length),
        "logits of the first sequence": length * facts.vocabulary * facts.float_dtype.itemsize,
    }
    if not facts.streamed:
        terms[f"hidden states of {samples} sequences, {followed} times"] = followed * hidden
    if facts.untied_bytes:
        terms["the output head's own weight"] = facts.untied_bytes
    terms |= _moments(facts)
    names = facts.recipe.names
    if "learned_rounding" in names:
        terms["learned rounding: rounding, codes, gradients"] = 4 * 8 * facts.block_elements
        terms["what its gradients need of a sequence"] = _saved(facts, length)
    if "distill" in names:
        terms["distillation: gradients of all layers"] = (
            facts.block_elements * facts.blocks * facts.float_dtype.itemsize
        )
        terms["what its gradients need"] = facts.blocks * _saved(facts, length)
        terms["logits, theirs and ours"] = (
            4 * length * facts.vocabulary * facts.float_dtype.itemsize
        )
    return terms


def _saved(facts: Facts, length: int) -> int:
    """What autograd keeps of one block's pass over a sequence."""
    per_token = 14 * facts.hidden + 5 * facts.inner
    return (length * per_token + 2 * facts.heads * length * length) * facts.float_dtype.itemsize


def _moments(facts: Facts) -> Terms:
    """Sums in float64 of each distinct input of a block, and the algorithm's matrices."""
    algorithm = facts.recipe.algorithm
    if not algorithm.needs_moments:
        return {}
    widths = _inputs(facts)
    kinds = 2 if algorithm.needs_cross else 1
    sums = sum(8 * k * k + 4 * _MOMENT_ROWS * k for k in widths) * kinds
    largest = max(widths, default=0)
    most = max((n * k for n, k in (x.shape for x in facts.quantized_linears)), default=0)
    ordered = any(x.scheme is not None and x.scheme.input_order for x in facts.quantized_linears)
    square = (5 if ordered else 4) * largest * largest
    return {
        "second moments of a block's inputs": sums,
        "the algorithm's matrices": 4 * (square + 6 * most),
    }


def _inputs(facts: Facts) -> list[int]:
    """Width of each tensor that layers of a block read: queries, keys and values share one."""
    widths = []
    for linear in facts.linears:
        if linear.inside and linear.scheme is not None:
            widths.append(linear.shape[1])
    return widths
