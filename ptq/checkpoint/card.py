"""README.md of a checkpoint: the model card, as the hub shows it."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel

from ptq.checkpoint.account import versions
from ptq.checkpoint.card_origin import Origin, identity_mark, model_identity, origin_of
from ptq.checkpoint.card_sections import (
    figures_section,
    loading,
    recipe_section,
    sizes,
    table,
    task_of,
)
from ptq.config import QuantizationConfig
from ptq.modules import quantized_modules

CARD = "README.md"
_MARK = "<!-- written by ptq: "
_CONVERTED = "Of the checkpoint that this one was converted from"


def card_text(
    model: PreTrainedModel,
    config: QuantizationConfig | None = None,
    report: Mapping[str, Any] | None = None,
    *,
    identity: str | None = None,
    origin: Origin | None = None,
    layout: str = "ptq",
    engine: str = "transformers",
    rounded: Sequence[str] | None = None,
) -> str:
    """The card of a quantized model.

    Args:
        config: what it was quantized with.
        report: sections of a run's report, for what was measured.
        identity: of the model (:func:`~ptq.checkpoint.manifest.identity`), to know its card again.
        origin: the card that the model had before; recipe and figures are those unless given here.
        layout: the format of the weight files, a name of :data:`~ptq.checkpoint.CONVERSIONS`.
        engine: whose limits the files keep, in a format of other toolkits.
        rounded: of a conversion: what it changed, in words; None: it is none.
    """
    base = _base(model, config) or (origin.base if origin else None)
    data = _metadata(model, config, base, origin, layout)
    body = [
        f"# {type(model).__name__}, quantized with ptq",
        f"Made from `{_shown(base, model)}` by post-training quantization; what the table does not "
        "name is float.",
        table(model),
        sizes(model),
        loading(model, layout, engine),
        recipe_section(config) or (origin.recipe if origin else ""),
        figures_section(report) if report else _carried_figures(origin, rounded),
        f"Made with {', '.join(f'{name} {v}' for name, v in versions().items())}.",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(filter(None, body)))
    text = card.content.rstrip() + "\n"
    if identity is not None:
        text += f"\n{identity_mark(identity)}\n"
    return f"{text}\n{_MARK}{_sha256(text)} -->\n"


def card_of(
    model: PreTrainedModel, config: QuantizationConfig | None = None, identity: str | None = None
) -> str:
    """The card of a ptq checkpoint of a model: the one that it was loaded with, if it is
    still that one; else a new one."""
    name = model.config.name_or_path
    origin = origin_of(Path(name) / CARD, identity) if name and identity else None
    if origin is not None and origin.layout == "ptq" and config is None:
        return origin.text
    return card_text(model, config, identity=identity, origin=origin)


def converted_card(
    model: PreTrainedModel,
    loaded: nn.Module,
    layout: str,
    engine: str,
    rounded: Sequence[str],
) -> str:
    """The card of a model in a format of another toolkit.

    Args:
        model: what was written; figures are those of the card that it was loaded with.
        loaded: what the format's files hold of it.
        engine, rounded: as in :func:`card_text`.
    """
    name = model.config.name_or_path
    origin = origin_of(Path(name) / CARD, model_identity(model)) if name else None
    return card_text(
        model,
        identity=model_identity(loaded),
        origin=origin,
        layout=layout,
        engine=engine,
        rounded=rounded,
    )


def is_own_card(path: Path) -> bool:
    """Whether ptq wrote this card and nobody has changed it since."""
    return is_own_text(path.read_text(encoding="utf-8", errors="replace"))


def is_own_text(card: str) -> bool:
    """Whether ptq wrote this card, and nobody has changed it since."""
    text, mark, rest = card.rpartition(f"\n{_MARK}")
    return bool(mark) and rest == f"{_sha256(text)} -->\n"


def tags(model: nn.Module, layout: str = "ptq") -> list[str]:
    """What the hub is told to find the model by."""
    schemes = {str(module.scheme) for module in quantized_modules(model).values()}
    return list(dict.fromkeys(["ptq", "quantized", layout, *sorted(schemes)]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _base(model: PreTrainedModel, config: QuantizationConfig | None) -> str | None:
    """The float model's name on the hub, or its directory or file."""
    if config and config.model:
        return config.model.id
    name: str = model.config._name_or_path
    return name if name and not Path(name).exists() else None  # it may be a checkpoint of ptq


def _shown(base: str | None, model: PreTrainedModel) -> str:
    """What a card, which may be published, says of the source: no more of a path than its end."""
    if base is None:
        return type(model).__name__
    return Path(base).name if Path(base).exists() else base


def _metadata(
    model: PreTrainedModel,
    config: QuantizationConfig | None,
    base: str | None,
    origin: Origin | None,
    layout: str,
) -> ModelCardData:
    on_hub = base is not None and base.count("/") == 1 and not Path(base).exists()
    source = config.model.id if config and config.model else model.config.name_or_path
    licence = origin.licence if origin else None
    if source and (Path(source) / CARD).is_file():
        text = (Path(source) / CARD).read_text(encoding="utf-8", errors="replace")
        licence = ModelCard(text, ignore_metadata_errors=True).data.get("license") or licence
    return ModelCardData(
        base_model=base if on_hub and base and ":" not in base else None,
        base_model_relation="quantized",
        library_name="transformers",
        license=licence,
        pipeline_tag=task_of(model),
        tags=tags(model, layout),
    )


def _carried_figures(origin: Origin | None, rounded: Sequence[str] | None) -> str:
    """What was measured of the checkpoint that the model came from."""
    if origin is None or not origin.figures or rounded is None:
        return origin.figures if origin else ""
    heading, _, rest = origin.figures.partition("\n\n")
    changes = "".join(f"; {note.partition(';')[0]}" for note in rounded)
    said = f"{_CONVERTED}{changes}.\n\n"
    return f"{heading}\n\n{said if changes or not rest.startswith(_CONVERTED) else ''}{rest}"
