"""Drawing the page: what each section needs is worked out here, the template only places it."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ptq.checkpoint.target import PAGE
from ptq.errors import CheckpointError
from ptq.report.page.layer_map import TOKEN_EDGES, Scale, strips, token_level
from ptq.report.page.numbers import Numbers
from ptq.report.page.plots import HEIGHT, WIDTH, curve, magnitude_histogram, weight_histogram
from ptq.report.page.read import check, read_directory
from ptq.report.page.schema import Inputs, PageData
from ptq.report.page.words import breakable, differences, visible

_ROWS = 1000  # of the table of layers; report.json has all
_SHOWN = 12  # of what is ranked


def report_page(directory: str | Path) -> Path:
    """Write ``report.html`` beside the ``report.json`` of a directory, whole or not at all.

    ``diagnosis.json`` and ``search.json`` are drawn as well where they lie beside it. The page
    needs no other file, and asks for none.

    Raises:
        CheckpointError: there is no report, it is damaged, or the page cannot be written.
    """
    directory = Path(directory)
    text = render(read_directory(directory))
    target = directory / PAGE
    temporary = target.with_suffix(".html.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from None
    return target


def render(sections: dict[str, Any]) -> str:
    """The page of a report's sections, as HTML.

    Raises:
        CheckpointError: a section is not what a run writes.
    """
    data = check(sections, "report")
    inputs = _different_inputs(data)
    template = _environment().get_template("template.html")
    return template.render(
        data=data,
        n=Numbers(sections),
        style=_style(),
        title=_title(data),
        config=yaml.safe_dump(data.config, sort_keys=False, allow_unicode=True),
        layer_map=_layer_map(data),
        layer_rows=_layer_rows(data),
        weight_plots=_weight_plots(data),
        input_plots=_input_plots(inputs),
        outliers=inputs[:_SHOWN],
        generation=_generation(data),
        search=_search(data),
        diagnosis=_diagnosis(data),
        token_level=token_level,
        token_edges=TOKEN_EDGES,
        width=WIDTH,
        height=HEIGHT,
        shown=_SHOWN,
    )


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("ptq.report.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"visible": visible, "breakable": breakable}
    return made


@cache
def _style() -> Markup:
    return Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8"))


def _title(data: PageData) -> str:
    """The last part of the model's name."""
    model = data.config.get("model") or {}
    name = str(model.get("id") if isinstance(model, dict) else model).rstrip("/")
    return name.rpartition("/")[2] if model else "A quantized model"


def _layer_map(data: PageData) -> dict[str, Any] | None:
    """Strips of the weights' errors, coloured by the signal-to-noise ratio: low is dark."""
    if data.weights is None:
        return None
    layers = data.weights.layers
    known = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None]
    if not known:
        return None
    scale = Scale.of([-value for value in known], narrowest=3.0)
    errors = [layer.relative_squared_error or 0.0 for layer in layers]
    levels = [0 if x.sqnr_db is None else scale.level(-x.sqnr_db) for x in layers]
    edges = [-edge for edge in scale.edges]
    return {
        "strips": strips([layer.name for layer in layers], errors),
        "levels": levels,
        "edges": edges,
    }


def _layer_rows(data: PageData) -> list[dict[str, Any]]:
    """The table of layers: indices into the plan and into the weights' errors."""
    if data.plan is None:
        return []
    places = {x.name: i for i, x in enumerate(data.weights.layers)} if data.weights else {}
    rows = [
        {"index": index, "layer": layer, "error": places.get(layer.name)}
        for index, layer in enumerate(data.plan.layers)
    ]
    return rows[:_ROWS]


def _weight_plots(data: PageData) -> list[dict[str, Any]]:
    if data.weights is None:
        return []
    places = {layer.name: index for index, layer in enumerate(data.weights.layers)}
    return [
        {
            "index": index,
            "seen": seen,
            "error": places.get(seen.name),
            "plot": weight_histogram(seen.before, seen.after, seen.low, seen.high),
        }
        for index, seen in enumerate(data.weights.histograms)
    ]


def _input_plots(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**row, "plot": _magnitudes(row["seen"])}
        for row in rows
        if row["seen"].magnitudes is not None and row["seen"].magnitudes.counts
    ]


def _magnitudes(seen: Inputs) -> Any:
    before = seen.magnitudes
    assert before is not None
    after = None if seen.after is None else (seen.after.lowest, seen.after.counts)
    return magnitude_histogram((before.lowest, before.counts), after, before.per_octave, seen.step)


def _different_inputs(data: PageData) -> list[dict[str, Any]]:
    """What layers read, the farthest outlier first: the largest channel beside the median one.

    Layers with the same largest channels read the same tensor: one stands for them, and it is one
    whose histogram was kept, if there is any.
    """
    found: dict[Any, dict[str, Any]] = {}
    for index, seen in enumerate(data.inputs):
        if seen.absmax is None or not seen.median_channel_absmax:
            continue
        key = tuple((c.channel, c.absmax) for c in seen.largest_channels)
        known = found.get(key)
        if known is None:
            found[key] = {"index": index, "seen": seen, "also": 0}
        else:
            known["also"] += 1
            if known["seen"].magnitudes is None and seen.magnitudes is not None:
                known |= {"index": index, "seen": seen}
    return sorted(found.values(), key=lambda r: -r["seen"].absmax / r["seen"].median_channel_absmax)


def _generation(data: PageData) -> Any:
    if data.generation is None:
        return None
    return [
        (each.prompt, differences(each.float_text, each.quantized_text))
        for each in data.generation.samples
    ]


def _search(data: PageData) -> Any:
    if data.search is None:
        return None
    found = data.search
    return curve(
        [(point.bytes, point.kl) for point in found.points],
        (found.chosen.bytes, found.chosen.kl),
        [(point.bytes, point.kl) for point in found.measured],
    )


def _diagnosis(data: PageData) -> Any:
    """The layers that cost most, and how long the bars of their causes are, in percent."""
    if data.diagnosis is None:
        return None
    order = sorted(enumerate(data.diagnosis.layers), key=lambda pair: -pair[1].kl)[:_SHOWN]
    causes = ("kl_weights", "kl_activations", "kl_clipping")
    widest = max((max(x.kl, _sum(x, causes)) for _, x in order), default=0.0) or 1.0
    return [
        {
            "index": index,
            "layer": layer,
            "parts": [
                (cause, 100 * max(0.0, getattr(layer, cause) or 0.0) / widest) for cause in causes
            ],
            "whole": 100 * max(0.0, layer.kl) / widest,
        }
        for index, layer in order
    ]


def _sum(layer: Any, causes: tuple[str, ...]) -> float:
    return float(sum(max(0.0, getattr(layer, cause) or 0.0) for cause in causes))
