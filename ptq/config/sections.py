"""The sections of the YAML file beside the scheme: model, calibration, evaluation, and so on."""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from ptq.config.section import (
    DTypeNameOrAuto,
    Plugin,
    Prompts,
    Section,
    Texts,
    TextsField,
    plugin_from_name,
)


class ModelConfig(Section):
    """Where the float model comes from and how it is held."""

    id: str = Field(
        min_length=1,
        description="hub id, local directory, .gguf file, or package:NAME/FILE",
        examples=["HuggingFaceTB/SmolLM2-360M-Instruct", "./my_model", "model.gguf"],
    )
    revision: str | None = Field(
        None, description="branch, tag or commit on the hub", examples=["main"]
    )
    dtype: DTypeNameOrAuto = Field("auto", description="auto: as stored")
    device: str = Field("cpu", description="cpu, cuda, cuda:1, ... or auto")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    stream: bool = Field(
        False,
        description="for a model larger than memory: read its safetensors files one block at a "
        "time; without evaluation and generation, which need the whole float model",
    )


def model_from_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class CalibrationConfig(Section):
    """The text that observers see."""

    data: Texts = Field(
        min_length=1,
        description=".txt, .jsonl, .parquet, a directory or a datasets id",
        examples=["calibration_data/calibration.jsonl", ["first.txt", "second.jsonl"]],
    )
    subset: str | None = Field(
        None, description="configuration name of a datasets id", examples=["wikitext-2-raw-v1"]
    )
    split: str = Field("train", description="split of a datasets id")
    column: str | None = Field(
        None, description="text or messages column (default: found)", examples=["text"]
    )
    samples: Annotated[int, Field(ge=1)] = Field(64, description="sequences used")
    sequence_length: Annotated[int, Field(ge=2)] = Field(512, description="tokens a sequence")
    batch_size: Annotated[int, Field(ge=1)] = Field(8, description="sequences at a time")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(
        0, description="seed of the choice of sequences"
    )
    observer: Annotated[
        Plugin, BeforeValidator(plugin_from_name, json_schema_input_type=Plugin | str)
    ] = Field(
        default_factory=lambda: Plugin(name="minmax"),
        description="minmax, moving_average, percentile, mse or entropy",
    )


class EvaluationConfig(Section):
    """Float against quantized on held-out text."""

    data: Texts = Field(
        min_length=1,
        description="as calibration.data; never the same text",
        examples=["calibration_data/evaluation.jsonl"],
    )
    subset: str | None = Field(
        None, description="configuration name of a datasets id", examples=["wikitext-2-raw-v1"]
    )
    split: str = Field("test", description="split of a datasets id")
    column: str | None = Field(
        None, description="text or messages column (default: found)", examples=["text"]
    )
    windows: Annotated[int, Field(ge=1)] = Field(16, description="windows scored at most")
    context: Annotated[int, Field(ge=2)] = Field(512, description="tokens a window")
    speed: bool = Field(
        False,
        description="time both models, taking turns; loads the float model again for it, so "
        "memory holds both",
    )
    fail_if: TextsField = Field(
        default_factory=list,
        description="conditions on the figures, such as 'kl_mean > 0.05' or 'ratio_high > 1.02': "
        "where one holds, the command ends with exit code 3 (the checkpoint is kept)",
    )


def text_from_source(value: Any) -> Any:
    return {"data": value} if isinstance(value, str | list) else value


class GenerationConfig(Section):
    """Samples of text before and after, decoded greedily."""

    prompt: Prompts = Field(
        ["The capital of France is"],
        min_length=1,
        description="what both models go on from; several texts one after the other",
        examples=["The three states of matter are", ["Once upon a time", "def main():"]],
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(
        32, description="tokens after each, at most"
    )
    chat: bool = Field(False, description="wrap prompts in the tokenizer's chat template")


class OutputConfig(Section):
    """Where the checkpoint goes."""

    dir: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        min_length=1, description="directory to create", examples=["out/my-model-w4"]
    )
    dtype: DTypeNameOrAuto = Field(
        "auto", description="dtype of what stays float (auto: the model's)"
    )
    shard_size_mb: Annotated[int, Field(ge=1)] = Field(5000, description="largest shard, in MB")
    overwrite: bool = Field(False, description="replace an existing ptq checkpoint")
    verify: Literal["process", "files"] = Field(
        "process",
        description="before the checkpoint appears: load and run it in a fresh process; or only "
        "compare every byte with its hash",
    )
    resume: bool = Field(
        True,
        description="keep finished blocks in DIR.work until the checkpoint is whole, so that the "
        "same command goes on after a kill; false: start anew",
    )


def output_from_dir(value: Any) -> Any:
    return {"dir": value} if isinstance(value, str) else value
