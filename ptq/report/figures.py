"""The plots of the report page as matplotlib figures, for notebooks.

Each takes the directory of a run, or the sections of its ``report.json``. matplotlib is the extra
``plots`` of this package: ``pip install "ptq-toolkit[plots]"``.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq.errors import ConfigError
from ptq.report.page.layer_map import TOKEN_EDGES, strips
from ptq.report.page.read import check, read_directory
from ptq.report.page.schema import PageData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Source = str | Path | dict[str, Any]
_BEFORE, _AFTER = "#c3c7cc", "#17687f"


def layer_map(source: Source) -> "Figure":
    """Signal-to-noise ratio of every layer's weights in dB, by kind of layer and block.

    Raises:
        CheckpointError: there is no report, or it is damaged.
        ConfigError: the report has no errors of weights (of an older version), or there is no
            matplotlib; likewise below.
    """
    weights = _part(_data(source), "weights")
    errors = [layer.relative_squared_error or 0.0 for layer in weights.layers]
    found = strips([layer.name for layer in weights.layers], errors)
    figure = _figure(9, 0.6 + sum(0.35 * len(strip.kinds) + 0.6 for strip in found))
    axes = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for ax, strip in zip(axes, found, strict=True):
        rows = [
            [_sqnr(weights, strip.cells.get((block, kind), ())) for block in strip.blocks]
            for kind in strip.kinds
        ]
        image = ax.imshow(rows, aspect="auto", cmap="cividis")
        ax.set_xticks(range(len(strip.blocks)), [str(block) for block in strip.blocks], fontsize=7)
        ax.set_yticks(range(len(strip.kinds)), strip.kinds)
        ax.set_xlabel(f"block of {strip.path}" if strip.path else "outside the blocks")
        figure.colorbar(image, ax=ax, label="signal to noise, dB")
    return figure


def weight_histogram(source: Source, layer: str | None = None) -> "Figure":
    """A layer's weights in steps of their grid, before and after; areas are equal.

    Args:
        layer: one of those whose histogram the report has (default: the one with the largest
            error).

    Raises:
        ConfigError: the report has no histogram of the layer.
    """
    histograms = {seen.name: seen for seen in _part(_data(source), "weights").histograms}
    name = layer if layer is not None else next(iter(histograms), None)
    if name not in histograms:
        raise ConfigError(
            f"the report has no histogram of layer {name}; it has {', '.join(histograms) or 'none'}"
        )
    seen = histograms[name]
    figure = _figure(6, 3)
    ax = figure.subplots()
    for counts, color, label, share in (
        (seen.before, _BEFORE, "before, float", 1.0),
        (seen.after, _AFTER, f"after, {seen.format}", 0.4),
    ):
        width = (seen.high - seen.low) / len(counts)
        centers = [seen.low + width * (index + 0.5) for index in range(len(counts))]
        heights = [count / (sum(counts) * width) for count in counts]
        ax.bar(centers, heights, width * share, color=color, label=label)
    ax.set(title=name, xlabel="weight, in steps of its scale", ylabel="density")
    ax.legend()
    return figure


def token_kl(source: Source, window: int = 0) -> "Figure":
    """KL divergence of each token of a window in nats, on a logarithmic axis.

    Args:
        window: which of those that the report has (0: a typical one).

    Raises:
        ConfigError: the report has no such window.
    """
    windows = _part(_data(source), "tokens").windows
    if not 0 <= window < len(windows):
        raise ConfigError(f"the report has {len(windows)} windows; {window} is none of them")
    chosen = windows[window]
    places = [index for index, kl in enumerate(chosen.kl) if kl is not None]
    figure = _figure(9, 3)
    ax = figure.subplots()
    ax.plot(places, [chosen.kl[index] for index in places], ".", color=_AFTER, markersize=4)
    ax.axhline(chosen.mean_kl, color=_BEFORE, label=f"mean, {chosen.mean_kl:.3g} nats")
    ax.set_yscale("symlog", linthresh=TOKEN_EDGES[0])
    ax.set(title=f"window {chosen.index}", xlabel="token", ylabel="KL divergence, nats")
    ax.legend()
    return figure


def size_quality(source: Source) -> "Figure":
    """The search's curve: size in MB against KL divergence in nats, with the chosen point."""
    found = _part(_data(source), "search")
    figure = _figure(6, 4)
    ax = figure.subplots()
    points = sorted((point.bytes / 1e6, point.kl) for point in found.points)
    ax.plot(*zip(*points, strict=True), ".-", color=_BEFORE, label="found")
    for point in found.measured:
        ax.plot(point.bytes / 1e6, point.kl, "o", mfc="none", mec="black")
        ax.annotate(point.name, (point.bytes / 1e6, point.kl))
    ax.plot(found.chosen.bytes / 1e6, found.chosen.kl, "o", color=_AFTER, ms=10, label="chosen")
    ax.set(xlabel="size, MB", ylabel="KL divergence, nats")
    if all(kl > 0 for _, kl in points):
        ax.set_yscale("log")
    ax.legend()
    return figure


def _data(source: Source) -> PageData:
    if isinstance(source, dict):
        return check(source, "report")
    return check(read_directory(Path(source)), str(source))


def _part(data: PageData, name: str) -> Any:
    part = getattr(data, name)
    if part is None:
        raise ConfigError(
            f"the report has no section {name!r}: it is of an older version, or the run did not "
            "measure it"
        )
    return part


def _sqnr(weights: Any, indices: tuple[int, ...]) -> float:
    """Of the worst layer in a cell; NaN where there is none, or no error."""
    found = weights.layers[indices[0]].sqnr_db if indices else None
    return math.nan if found is None else found


def _figure(width: float, height: float) -> "Figure":
    """An empty figure, which a notebook shows where it is a cell's value."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise ConfigError('figures need matplotlib: pip install "ptq-toolkit[plots]"') from None
    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    pyplot.close(figure)  # or the notebook shows it twice
    return figure
