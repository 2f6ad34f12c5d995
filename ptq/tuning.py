"""ptq.tune: the kernels that are fastest on this machine, measured on the model's own layers."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import nn

from ptq.compilation import CompiledGenerate
from ptq.errors import ConfigError, UnsupportedError
from ptq.kernels import KERNELS, Kernel, LinearSpec, Reference
from ptq.modules import QuantLinear, quantized_layers
from ptq.native import ready
from ptq.report import Times, TunedLayers, Tuning
from ptq.tuning_cache import TuningCache

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
FLOAT = "float"
_COLD_BYTES = 64_000_000  # copies of a layer that take turns exceed a last-level cache
_HOPELESS = 4.0  # times the best: not measured any further

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def tune(
    model: nn.Module,
    *,
    rows: Sequence[int] = ROWS,
    memory: float = 0.6,
    seconds: float = 0.1,
    dtype: torch.dtype | None = None,
    cache: bool = True,
    progress: Progress = iter,
) -> Tuning:
    """Measure which kernel is fastest for each layer and number of rows, and use it from now on.

    Layers of equal shape and scheme are measured once, taking turns, so that their weights come
    from memory as they do in the model. A number of rows that was not measured gets the kernel of
    the nearest one that was, by ratio. Compiled models keep the rule of thumb.

    Args:
        rows: numbers of rows (tokens in a call) to measure.
        memory: bytes that a layer may hold, its quantized weight and all kernels' own forms of
            it, as a share of the layer in bfloat16. 0.6 allows torch's packing of int4 beside the
            codes; 1.1 oneDNN's packing of int8; 1.6 the float weight as well, after which next to
            nothing is slower than the float model.
        seconds: for one shape and number of rows.
        dtype: of the activations (default: the model's).
        cache: look for an earlier measurement on this machine, and keep this one.

    Raises:
        UnsupportedError: the model has no quantized layer.
        ConfigError: an argument is out of range, or the cache file is damaged.
    """
    layers = quantized_layers(model)
    if isinstance(model.__dict__.get("generate"), CompiledGenerate):
        raise UnsupportedError("the model is compiled, which keeps the rule of thumb: tune first")
    if not rows or not all(type(m) is int and m >= 1 for m in rows):
        raise ConfigError(f"rows {list(rows)}: give whole numbers of at least 1")
    rows = sorted(set(rows))
    if not 0 < memory < math.inf or not 0 < seconds < math.inf:
        raise ConfigError(f"memory {memory} and seconds {seconds}: numbers above 0")
    first = next(iter(model.parameters()), None)
    dtype = dtype or (torch.float32 if first is None else first.dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype {dtype!r}: give a floating dtype such as torch.bfloat16")
    device = next(iter(layers.values())).codes.device
    alike: dict[tuple[LinearSpec, str], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        alike[layer.spec(device.type, dtype, 1), str(layer.scheme)].append(name)
    store = TuningCache.open() if cache else None
    found = []
    for spec, scheme in progress(alike):
        members = [layers[name] for name in alike[spec, scheme]]
        key = (
            f"{spec}, {scheme}, rows {list(rows)}, memory {memory}, seconds {seconds}, "
            f"own kernels {ready()}"
        )
        times = None if store is None else store.get(key)
        cached = times is not None and _complete(times, spec, rows)
        if times is None or not cached:
            times = _measure(members, spec, rows, memory, seconds, device)
            if store is not None:
                store.put(key, times)
        choice = _choose(times, spec, rows, memory, members[0])
        for layer in members:
            layer.tune(device.type, dtype, choice)
        found.append(
            TunedLayers(tuple(alike[spec, scheme]), (spec.n, spec.k), scheme, times,
                        tuple((m, k.name) for m, k in choice), cached)
        )  # fmt: skip
    return Tuning(device.type, str(dtype).removeprefix("torch."), tuple(rows), tuple(found))


def _complete(times: Times, spec: LinearSpec, rows: Sequence[int]) -> bool:
    """Whether the times are of kernels that serve this spec, and some cost no memory."""
    kernels = {k.name: k for k in KERNELS}
    if FLOAT not in times or any(m not in times[FLOAT] for m in rows):
        return False
    served = [n for n in times if n != FLOAT]
    if any(
        n not in kernels or any(kernels[n].supports(spec.with_rows(m)) for m in times[n])
        for n in served
    ):
        return False
    free = [n for n in served if kernels[n].extra_bytes(spec) == 0]
    return any(all(m in times[n] for m in rows) for n in free)


@torch.inference_mode()  # where no activation is shared: each call quantizes its input
def _measure(
    layers: list[QuantLinear],
    spec: LinearSpec,
    rows: Sequence[int],
    memory: float,
    seconds: float,
    device: torch.device,
) -> Times:
    """Candidates take turns, on enough layers that their weights are not in a cache."""
    canonical = layers[0].quantized_weight.nbytes
    enough = max(2, math.ceil(_COLD_BYTES / canonical))
    used = list(islice(layers, enough))
    weights = [layer.quantized_weight.dequantize(spec.dtype) for layer in used]
    candidates = [k for k in KERNELS if _allowed(k, spec, rows, memory, canonical)]
    times: Times = defaultdict(dict)
    for m in rows:
        x = torch.randn(m, spec.k, device=device).to(spec.dtype)
        runs = {FLOAT: _turns([_float(x, w) for w in weights])}
        for kernel in candidates:
            if kernel.supports(spec.with_rows(m)) is None:
                runs[kernel.name] = _turns([_forced(layer, kernel, x) for layer in used])
        for name, value in _race(runs, seconds, device).items():
            times[name][m] = 1e3 * value
    for layer in used:
        layer.release()
    return dict(times)


def _allowed(
    kernel: Kernel, spec: LinearSpec, rows: Sequence[int], memory: float, canonical: int
) -> bool:
    """Whether the kernel is a candidate at all; the reference is for tests."""
    if isinstance(kernel, Reference):
        return False
    if all(kernel.supports(spec.with_rows(m)) is not None for m in rows):
        return False
    return _fits(spec, canonical, kernel.extra_bytes(spec), memory)


def _fits(spec: LinearSpec, canonical: int, extra: int, memory: float) -> bool:
    """Whether the forms fit the memory; what takes nothing always does."""
    return extra == 0 or canonical + extra <= memory * 2 * spec.n * spec.k


def _float(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weight)


def _forced(layer: QuantLinear, kernel: Kernel, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer.run(x, kernel)


def _turns(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """Each time the next of the calls, all of which have been made once."""
    for call in calls:
        call()
    turn = cycle(calls)
    return lambda: next(turn)()


def _race(
    runs: dict[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, float]:
    """Median seconds of each, in turns; what is hopeless drops out early."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    active = dict(runs)
    shuffle = random.Random(0).shuffle
    while time.perf_counter() < end or len(times[FLOAT]) < 5:
        order = list(active.items())
        shuffle(order)  # what ran before decides what is in the caches
        for name, run in order:
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        if len(times[FLOAT]) == 3:
            best = min(median(t) for t in times.values())
            active = {
                n: r for n, r in runs.items() if n == FLOAT or median(times[n]) < _HOPELESS * best
            }
    return {name: median(values) for name, values in times.items()}


def _choose(
    times: Times, spec: LinearSpec, rows: Sequence[int], memory: float, layer: QuantLinear
) -> tuple[tuple[int, Kernel], ...]:
    """(first row, kernel): the fastest kernels whose forms fit the memory together.

    While they do not fit, the form that takes the most is given up.
    """
    canonical = layer.quantized_weight.nbytes
    kernels = {k.name: k for k in KERNELS if k.name in times}
    while True:
        best = {m: min((times[n][m], n) for n in kernels if m in times[n])[1] for m in rows}
        extra = {name: kernels[name].extra_bytes(spec) for name in set(best.values())}
        if _fits(spec, canonical, sum(extra.values()), memory):
            break
        del kernels[max(extra, key=lambda name: (extra[name], name))]
    choice: list[tuple[int, Kernel]] = []
    for i, m in enumerate(rows):
        first = 1 if i == 0 else math.ceil(math.sqrt(rows[i - 1] * m))
        if not choice or choice[-1][1].name != best[m]:
            choice.append((first, kernels[best[m]]))
    return tuple(choice)
