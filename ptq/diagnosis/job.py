"""The diagnosis of a recipe or of a checkpoint: what is loaded, and where the text comes from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ptq import checkpoint
from ptq.calibrate import TokenSet, evaluation_windows
from ptq.config import EvaluationConfig, ModelConfig, QuantizationConfig, load_config, make_section
from ptq.diagnosis.result import Diagnosis
from ptq.diagnosis.run import diagnose
from ptq.errors import ConfigError, ModelError
from ptq.model import ModelSource, load_model, load_tokenizer, resolve_device
from ptq.report import Console


@dataclass(frozen=True)
class Request:
    """What is asked of a diagnosis on the command line.

    Args:
        source: a YAML recipe, or the directory of a checkpoint.
        reference: the float model: of a checkpoint; a recipe names its own.
        data: text (default: the recipe's evaluation section).
        overrides: of the recipe, ``key=value``.
    """

    source: str
    reference: str | None = None
    data: Sequence[str] = ()
    layers: str = "*"
    windows: int = 2
    context: int = 128
    top: int = 5
    device: str = "cpu"
    overrides: Sequence[str] = field(default_factory=tuple)


def check_output(directory: Path | None, source: str) -> Path | None:
    """Where ``diagnosis.json`` goes: the directory, or else a checkpoint's own.

    Raises:
        ConfigError: it is not there.
    """
    if directory is None:
        return Path(source) if Path(source).is_dir() else None
    if not directory.is_dir():
        raise ConfigError(f"--output {directory} is no directory; create it first")
    return directory


def run_diagnosis(request: Request, console: Console) -> Diagnosis:
    """Load both models, the float one in float32, and compare them layer by layer.

    Raises:
        PTQError: bad input, before the models are loaded wherever it can be seen by then.
    """
    if Path(request.source).is_dir():
        return _of_checkpoint(request, console)
    return _of_recipe(request, load_config(request.source, list(request.overrides)), console)


def _of_recipe(request: Request, config: QuantizationConfig, console: Console) -> Diagnosis:
    if request.reference is not None:
        raise ConfigError("--reference goes with a checkpoint; a recipe names its float model")
    if config.model is None:
        raise ConfigError(f"{request.source}: key 'model' is required: the float model")
    data = list(request.data) or ([] if config.evaluation is None else config.evaluation.data)
    if not data:
        raise ConfigError(f"{request.source} has no evaluation section: name a text with --data")
    section = config.model.model_copy(update={"dtype": "float32", "stream": False})
    source = ModelSource.resolve(section)
    tokenizer = _tokenizer(source, section.id)
    tokens = _text(request, data, tokenizer)
    model = _float(source, console)
    return _diagnosed(request, model, tokens, config, tokenizer, console)


def _of_checkpoint(request: Request, console: Console) -> Diagnosis:
    if request.reference is None:
        raise ConfigError(
            f"{request.source} is a checkpoint: name the float model with --reference"
        )
    if request.overrides:
        raise ConfigError("--set goes with a recipe; a checkpoint is as it is")
    if not request.data:
        raise ConfigError("name a text to measure on with --data")
    device = resolve_device(request.device)
    wanted = ModelConfig(id=request.reference, dtype="float32", device=str(device))
    source = ModelSource.resolve(wanted)
    tokenizer = _tokenizer(source, request.reference)
    tokens = _text(request, request.data, tokenizer)
    console.stage("load the checkpoint")
    quantized = checkpoint.load(request.source, device=device)
    model = _float(source, console)
    return _diagnosed(request, model, tokens, quantized, tokenizer, console)


def _float(source: ModelSource, console: Console) -> nn.Module:
    console.stage("load the float model")
    return load_model(source, bars=console.mode != "quiet", say=console.say)


def _tokenizer(source: ModelSource, name: str) -> Any:
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError(f"{name} has no tokenizer, which the text needs")
    return tokenizer


def _text(request: Request, data: Sequence[str], tokenizer: Any) -> TokenSet:
    section = make_section(
        EvaluationConfig,
        "--data",
        data=list(data),
        windows=request.windows,
        context=request.context,
    )
    return evaluation_windows(section, tokenizer)


def _diagnosed(
    request: Request,
    model: nn.Module,
    tokens: TokenSet,
    quantized: nn.Module | QuantizationConfig,
    tokenizer: Any,
    console: Console,
) -> Diagnosis:
    console.stage("diagnose")
    return diagnose(
        model,
        tokens,
        quantized,
        tokenizer=tokenizer,
        layers=request.layers,
        top=request.top,
        console=console,
    )
