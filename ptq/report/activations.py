"""What the layers of a model read, on some text: sizes, outlier channels and tokens, the grid."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate import watching
from ptq.evaluation import window_logits
from ptq.kernels import quantize_activation
from ptq.model import unfolded
from ptq.modules import QuantLinear

TOKENS = 512  # of text, at most
_CHANNELS = 3  # outliers that are named
_GRID = ("after", "step", "zero", "clipped")
_LOWEST, _HIGHEST, _PER_OCTAVE = -16, 16, 2  # powers of two that magnitudes are counted between


def record_inputs(
    model: nn.Module, layers: Iterable[str], window: Tensor
) -> dict[str, dict[str, Any]]:
    """Run a model on the first tokens of a window [T] and look at the inputs of its layers.

    Magnitudes are counted in half octaves from 2^-16 to 2^16 (the outermost bins have what is
    beyond). Of the largest channels and the largest token, indices count from 0.

    Args:
        layers: names of linear layers, as in the unfolded model; float or quantized. Others, and
            layers that no token reaches, are left out.

    Returns:
        By name, for JSON. Of quantized layers with quantized activations, ``after``: the same
        counts of what the codes stand for, the median ``step`` of a token, and the shares of
        values that became ``zero`` (without being it) and that were ``clipped``.
    """
    layers = set(layers)
    found: dict[str, dict[str, Any]] = {}
    last: list[Any] = [None, {}]  # layers that read the same tensor do so one after the other

    def see(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        if last[0] is not x:
            last[:] = x, _sizes(rows.float())
        layer = modules[name]
        after = _after(layer, rows) if isinstance(layer, QuantLinear) else {}
        found[name] = {**last[1], **after}

    with unfolded(model, layers):
        modules = {
            name: module
            for name, module in model.named_modules()
            if name in layers and isinstance(module, nn.Linear | QuantLinear)
        }
        with watching(modules, see):
            window_logits(model, window[:TOKENS])
    return found


def inputs_section(
    before: dict[str, dict[str, Any]],
    after: dict[str, dict[str, Any]],
    texts: Sequence[str],
    histograms: int = 12,
) -> list[dict[str, Any]]:
    """For JSON, a row for each layer.

    Args:
        before, after: of :func:`record_inputs`, for the float and the quantized model.
        texts: of the window's tokens.
        histograms: so many layers keep the counts of magnitudes: those with the farthest outliers,
            one for all that read the same tensor.
    """
    kept = _farthest(before, histograms)
    made = []
    for name, seen in before.items():
        row = {"name": name, **seen}
        if "largest_token" in row:
            row["largest_token_text"] = texts[row["largest_token"]]
        row |= {key: value for key, value in after.get(name, {}).items() if key in _GRID}
        if name not in kept:
            row = {key: value for key, value in row.items() if key not in ("magnitudes", "after")}
        made.append(row)
    return made


def _farthest(seen: dict[str, dict[str, Any]], most: int) -> list[str]:
    """Layers by how far their largest channel is above the median one."""
    first: dict[str, tuple[float, str]] = {}
    for name, found in seen.items():
        if found.get("median_channel_absmax"):
            ratio = found["absmax"] / found["median_channel_absmax"]
            first.setdefault(str(found["largest_channels"]), (ratio, name))
    return [name for _, name in sorted(first.values(), reverse=True)[:most]]


def _sizes(x: Tensor) -> dict[str, Any]:
    """Of rows [R, K], float32."""
    if not len(x):
        return {}
    size = x.abs()
    channels, tokens = size.amax(0), size.amax(1)
    top = channels.topk(min(_CHANNELS, len(channels)))
    return {
        "absmax": _short(channels.max()),
        "median_channel_absmax": _short(channels.median()),
        "median_token_absmax": _short(tokens.median()),
        "largest_channels": [
            {"channel": channel, "absmax": _short(value)}
            for channel, value in zip(top.indices.tolist(), top.values, strict=True)
        ],
        "largest_token": int(tokens.argmax()),
        "magnitudes": _magnitudes(size),
    }


def _after(layer: QuantLinear, x: Tensor) -> dict[str, Any]:
    """What becomes of the layer's input, rotated first where the layer does that."""
    scheme = layer.scheme.activations
    if scheme is None or not len(x):
        return {}
    rows = (x if layer.rotation is None else layer.rotation(x)).float()
    made = quantize_activation(rows, scheme, layer.input_scale, layer.input_zero_point)
    values, step = made.dequantize(), made.scale
    assert step is not None
    off = (values - rows).abs() > 0.5001 * step
    return {
        "after": _magnitudes(values.abs()),
        "step": _short(step.median()),
        "zero": _share((values == 0) & (rows != 0)),
        "clipped": _share(off) if scheme.mode == "static" else 0.0,
    }


def _magnitudes(size: Tensor) -> dict[str, Any]:
    """Counts in half octaves, without the empty ends; ``zeros`` apart.

    ``lowest``: the power of two where the first bin begins.
    """
    bins = (_HIGHEST - _LOWEST) * _PER_OCTAVE
    some = size[size > 0]
    index = ((some.log2() - _LOWEST) * _PER_OCTAVE).floor_().clamp_(0, bins - 1)
    counts = index.to(torch.int64).bincount(minlength=bins).tolist()
    used = [i for i, count in enumerate(counts) if count]
    first, last = (used[0], used[-1]) if used else (0, -1)
    return {
        "lowest": _LOWEST + first / _PER_OCTAVE,
        "per_octave": _PER_OCTAVE,
        "counts": counts[first : last + 1],
        "zeros": size.numel() - some.numel(),
    }


def _share(chosen: Tensor) -> float:
    return _short(chosen.double().mean())


def _short(value: Tensor) -> float:
    """Four significant digits."""
    number = float(value)
    return number if number == 0 or not math.isfinite(number) else float(f"{number:.4g}")
