"""The state of one run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ptq.calibrate import TokenSet
from ptq.config import ModelConfig, OutputConfig, QuantizationConfig, torch_dtype
from ptq.errors import ConfigError
from ptq.evaluation import Condition, HeldReference, Kind
from ptq.model import ModelSource, StreamedModel
from ptq.planning import Plan
from ptq.preflight import Facts, Prediction, clock
from ptq.quantization import needs_data
from ptq.recipe import Recipe
from ptq.report import Console, Report, WeightRecorder, environment
from ptq.report.report import cpu_seconds
from ptq.resume import Work, work_root


@dataclass
class Job:
    """One run: what its stages, which are the functions beside this file, hand to each other."""

    config: QuantizationConfig
    console: Console
    report: Report = field(init=False)
    start: float = field(default_factory=time.perf_counter, init=False)
    cpu_start: float = field(default_factory=cpu_seconds, init=False)
    clock_start: float = field(default_factory=clock, init=False)
    source: ModelSource = field(init=False)
    model_config: PretrainedConfig = field(init=False)
    recipe: Recipe = field(init=False)
    plan: Plan = field(init=False)
    cache_bytes: int = field(default=0, init=False)  # of the static scales of keys and values
    facts: Facts = field(init=False)
    forecast: Callable[[Facts], Prediction] = field(init=False)
    work: Work | None = field(default=None, init=False)
    streamed: StreamedModel | None = field(default=None, init=False)
    tokenizer: Any = field(default=None, init=False)
    calibration: TokenSet | None = field(default=None, init=False)
    evaluation: TokenSet | None = field(default=None, init=False)
    prompts: list[tuple[str, Tensor]] = field(default_factory=list, init=False)
    kind: Kind = field(default="causal", init=False)
    held: HeldReference | None = field(default=None, init=False)
    gate: list[Condition] = field(default_factory=list, init=False)
    samples: dict[str, Any] = field(default_factory=dict, init=False)
    weights: WeightRecorder = field(default_factory=WeightRecorder, init=False)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    card: str | None = field(default=None, init=False)
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.report = Report(
            {"config": self.config.model_dump(mode="json"), "environment": environment()}
        )

    def note(self, text: str) -> None:
        """Say what the user may not expect; the report repeats it."""
        self.notes.append(text)
        self.console.say(f"note: {text}")

    @property
    def model_section(self) -> ModelConfig:
        if self.config.model is None:
            raise ConfigError("key 'model' is required: a hub id, a directory or a .gguf file")
        return self.config.model

    @property
    def output(self) -> OutputConfig:
        if self.config.output is None:
            raise ConfigError("key 'output' is required: the directory to create")
        return self.config.output

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors of the checkpoint, as planned."""
        return self.plan.bytes_after + self.cache_bytes

    @property
    def calibrates(self) -> bool:
        return needs_data(self.plan, self.recipe, self.config)

    def dtype(self) -> torch.dtype:
        """dtype of what stays float: the output section's, else the loaded model's."""
        wanted = "auto" if self.config.output is None else self.config.output.dtype
        return self.float_dtype() if wanted == "auto" else torch_dtype(wanted)

    def float_dtype(self) -> torch.dtype:
        """dtype that the float model is loaded in."""
        if isinstance(self.source.dtype, torch.dtype):
            return self.source.dtype
        stored = self.model_config.dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32

    @property
    def work_root(self) -> Path:
        return work_root(self.output.dir)

    @property
    def may_replace(self) -> bool:
        ours = self.work is not None and self.work.saving_was_cut_off
        return self.output.overwrite or ours
