"""README.md of a checkpoint: the model card, as the hub shows it."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ptq.checkpoint.account import versions
from ptq.config import QuantizationConfig
from ptq.modules import quantized_modules

CARD = "README.md"
_MARK = "<!-- written by ptq: "
_TASKS: dict[str, Any] = {
    "text-generation": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "fill-mask": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "automatic-speech-recognition": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def card_text(
    model: PreTrainedModel,
    config: QuantizationConfig | None = None,
    report: Mapping[str, Any] | None = None,
) -> str:
    """The card of a quantized model.

    Args:
        config: what it was quantized with.
        report: sections of a run's report, for what was measured.
    """
    base = _base(model, config)
    card = ModelCard(f"---\n{_metadata(model, base).to_yaml()}\n---\n" + _body(model, base))
    card.text += _recipe(config) + _figures(report or {}) + _made_with()
    text = card.content.rstrip() + "\n"
    return f"{text}\n{_MARK}{_sha256(text)} -->\n"


def with_card(
    model: nn.Module,
    config: QuantizationConfig | None,
    extra_files: Mapping[str, str],
    carried: Collection[str],
) -> dict[str, str]:
    """The files to write, with a card of a transformers model where the user gives none."""
    if not isinstance(model, PreTrainedModel) or CARD in extra_files or CARD in carried:
        return dict(extra_files)
    return {**extra_files, CARD: card_text(model, config)}


def is_own_card(path: Path) -> bool:
    """Whether ptq wrote this card and nobody has changed it since."""
    text, mark, rest = path.read_text(encoding="utf-8", errors="replace").rpartition(f"\n{_MARK}")
    return bool(mark) and rest == f"{_sha256(text)} -->\n"


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


def _metadata(model: PreTrainedModel, base: str | None) -> ModelCardData:
    on_hub = base is not None and base.count("/") == 1 and not Path(base).exists()
    source = Path(base) / CARD if base is not None else None
    licence = None
    if source is not None and source.is_file():
        licence = ModelCard.load(source, ignore_metadata_errors=True).data.license
    name = type(model).__name__
    return ModelCardData(
        base_model=base if on_hub and base and ":" not in base else None,
        base_model_relation="quantized",
        library_name="transformers",
        license=licence,
        pipeline_tag=next((t for t, names in _TASKS.items() if name in names.values()), None),
        tags=tags(model),
    )


def tags(model: nn.Module) -> list[str]:
    """What the hub is told to find the model by."""
    schemes = {str(module.scheme) for module in quantized_modules(model).values()}
    return ["ptq", "quantized", *sorted(schemes)]


def _body(model: PreTrainedModel, base: str | None) -> str:
    layers = quantized_modules(model)
    rows = Counter((str(m.scheme), type(m).__name__) for m in layers.values())
    table = "\n".join(f"| {count} {kind} | `{scheme}` |" for (scheme, kind), count in rows.items())
    size = sum(t.nbytes for module in layers.values() for t in module.state_dict().values())
    return f"""# {type(model).__name__}, quantized with ptq

Made from `{_shown(base, model)}` by post-training quantization; all other layers are
float.

```python
import ptq
from transformers import AutoModel  # or the class for your task
model = AutoModel.from_pretrained("the directory or repository of this card")
```

| layers | scheme |
|---|---|
{table}

Their tensors take {size / 1e6:,.1f} MB. `config.json` names each layer;
`ptq_manifest.json` has the hash of every tensor.
"""


def _recipe(config: QuantizationConfig | None) -> str:
    if config is None:
        return ""
    steps = ", ".join(step.name for step in config.recipe)
    data = config.calibration
    seen = "without data"
    if data is not None:
        seen = f"on {data.samples} sequences of {data.sequence_length} tokens at most"
    return f"\n## Recipe\n\n`[{steps}]`, {seen}.\n"


def _figures(report: Mapping[str, Any]) -> str:
    found = report.get("evaluation")
    if found is None:
        return "\nIts quality was not measured.\n" if report else ""
    if "kind" in found:
        return _other_figures(found)
    high = "unknown" if found["ratio_high"] is None else f"{found['ratio_high']:.4f}"
    protocol = found["protocol"]
    return f"""
## Measured

| | float | quantized |
|---|---|---|
| perplexity | {found["float_perplexity"]:.3f} | {found["quantized_perplexity"]:.3f} |

Perplexity ratio {found["ratio"]:.4f} [{found["ratio_low"]:.4f}, {high}]; KL divergence
{found["kl_mean"]:.4f} nats a token on average; the same most probable token in
{100 * found["top1_agreement"]:.1f}% of the places. {protocol["windows"]} windows of
{protocol["context"]} tokens, {protocol["tokens_scored"]:,} scored; interval:
{protocol["interval"]}. `report.json` has everything.
"""


def _other_figures(found: Mapping[str, Any]) -> str:
    """Of a model that predicts no next token."""
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in numbers.items())
    return f"""
## Measured

Against the float model; `report.json` has everything.

| | |
|---|---|
{rows}
"""


def _made_with() -> str:
    return f"\nMade with {', '.join(f'{name} {v}' for name, v in versions().items())}.\n"
