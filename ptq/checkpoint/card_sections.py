"""The parts of a model card."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ptq.checkpoint.tensors import distinct_tensors
from ptq.config import QuantizationConfig
from ptq.modules import quantized_modules

RECIPE, FIGURES = "## Recipe", "## Measured"
_TASKS: dict[str, tuple[str, Any]] = {
    "text-generation": (
        "AutoModelForCausalLM",
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    "fill-mask": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "image-classification": (
        "AutoModelForImageClassification",
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "automatic-speech-recognition": (
        "AutoModelForSpeechSeq2Seq",
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ),
    "image-text-to-text": (
        "AutoModelForImageTextToText",
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
    "text-classification": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
}
_NEEDS = {
    "ptq": "ptq-toolkit",
    "compressed-tensors": "compressed-tensors",
    "gptq": "optimum gptqmodel",
    "gptq-v2": "optimum gptqmodel",
    "awq": "gptqmodel",
}
"""What transformers needs to load a format."""


def task_of(model: PreTrainedModel) -> str | None:
    """What the hub calls what the model does, if its class says so."""
    name = type(model).__name__
    return next((task for task, (_, names) in _TASKS.items() if name in names.values()), None)


def table(model: nn.Module) -> str:
    """How many modules of each kind have which scheme."""
    layers = quantized_modules(model).values()
    rows = Counter((str(m.scheme), type(m).__name__) for m in layers)
    lines = [f"| {count} {kind} | `{scheme}` |" for (scheme, kind), count in rows.items()]
    return "\n".join(["| layers | scheme |", "|---|---|", *lines])


def sizes(model: nn.Module) -> str:
    """Bytes of the tensors, and of the quantized layers among them."""
    layers = quantized_modules(model).values()
    own = sum(t.nbytes for module in layers for t in module.state_dict().values())
    stored, _ = distinct_tensors(model, model.state_dict().keys())
    total = sum(tensor.nbytes for tensor in stored.values())
    return (
        f"All tensors take {total / 1e6:,.1f} MB, those of the quantized layers "
        f"{own / 1e6:,.1f} MB. `config.json` names each layer."
    )


def loading(model: PreTrainedModel, layout: str, engine: str) -> str:
    """How the files are loaded, and what is known of the engines that do."""
    task = task_of(model)
    auto = "AutoModel" if task is None else _TASKS[task][0]
    imports = ["import ptq"] if layout == "ptq" else []
    code = [
        *imports,
        f"from transformers import {auto}{'  # or another class' if task is None else ''}",
        f'model = {auto}.from_pretrained("the directory or repository of this card")',
    ]
    return "\n".join(
        [
            "## Loading",
            "",
            f"`pip install transformers {_NEEDS[layout]}`, then:",
            "",
            "```python",
            *code,
            "```",
            "",
            _engines(layout, engine),
        ]
    )


def _engines(layout: str, engine: str) -> str:
    if layout == "ptq":
        return (
            "A process that does not import `ptq` gets random weights without an error. "
            "`ptq_manifest.json`, or the header of the weight files, has the hash of every tensor."
        )
    said = f"The files are in the {layout} format; `ptq.load` reads them on ptq's kernels. "
    if engine == "vllm":
        return said + (
            "They keep the limits of vLLM as its sources give them (schemes, group sizes, shapes); "
            "vLLM itself was not run: `vllm serve DIRECTORY`."
        )
    return said + "Whether vLLM loads them was not checked when they were written."


def recipe_section(config: QuantizationConfig | None) -> str:
    """The steps, and how much data they saw; nothing without a config."""
    if config is None:
        return ""
    steps = ", ".join(step.name for step in config.recipe)
    data = config.calibration
    seen = "without data"
    if data is not None:
        seen = f"on {data.samples} sequences of {data.sequence_length} tokens at most"
    return f"{RECIPE}\n\n`[{steps}]`, {seen}."


def figures_section(report: Mapping[str, Any]) -> str:
    """What a run measured."""
    found = report.get("evaluation")
    if found is None:
        return "Its quality was not measured."
    if "kind" in found:
        return _other_figures(found)
    high = "unknown" if found["ratio_high"] is None else f"{found['ratio_high']:.4f}"
    protocol = found["protocol"]
    return f"""{FIGURES}

| | float | quantized |
|---|---|---|
| perplexity | {found["float_perplexity"]:.3f} | {found["quantized_perplexity"]:.3f} |

Perplexity ratio {found["ratio"]:.4f} [{found["ratio_low"]:.4f}, {high}]; KL divergence
{found["kl_mean"]:.4f} nats a token on average; the same most probable token in
{100 * found["top1_agreement"]:.1f}% of the places. {protocol["windows"]} windows of
{protocol["context"]} tokens, {protocol["tokens_scored"]:,} scored; interval:
{protocol["interval"]}. `report.json` of the run has everything."""


def _other_figures(found: Mapping[str, Any]) -> str:
    """Of a model that predicts no next token."""
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in numbers.items())
    return f"""{FIGURES}

Against the float model; `report.json` of the run has everything.

| | |
|---|---|
{rows}"""
