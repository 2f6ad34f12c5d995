"""The configuration: what the user asked, checked and with every default resolved.

:class:`QuantizationConfig` is the whole YAML file. Each section is a pydantic model that rejects
unknown keys; :func:`load_config` turns what pydantic finds into one line per mistake, with the
file, the line and the nearest known key.
"""

import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ptq.core import Granularity
from ptq.errors import ConfigError
from ptq.formats import FLOAT8, FORMATS, INTEGERS, Format, IntFormat
from ptq.presets import PRESETS as PRESETS
from ptq.presets import SCHEME_PATTERN

DTypeName = Literal["float32", "float16", "bfloat16"]
DTypeNameOrAuto = Literal["float32", "float16", "bfloat16", "auto"]

_PRESET = re.compile(
    r"w(?P<bits>[2-8])a(?P<abits>16|8)(-g(?P<group>\d+)|(?P<tensor>-tensor))?"
    r"(?P<asym>-asym)?(?P<static>-static)?"
)
_FLOATS = {"fp8": {"format": FLOAT8.name}, "fp8-a16": None}
"""Presets of floating-point weights, with their activations."""


_BELOW_EIGHT = [
    name for name, fmt in INTEGERS.items() if fmt.bits < 8
]  # a list: a value from YAML may have no hash

Named = Annotated[str, Field(min_length=1)]
Sources = Annotated[list[str], Field(min_length=1)]

Texts = Annotated[
    list[str],
    BeforeValidator(
        lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=Sources | str
    ),
]

NotBlank = Annotated[str, Field(pattern=r"\S")]
Prompts = Annotated[
    list[NotBlank],
    BeforeValidator(
        lambda v: [v] if isinstance(v, str) else v,
        json_schema_input_type=Annotated[list[NotBlank], Field(min_length=1)] | NotBlank,
    ),
]

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Base of every part of the configuration: immutable; nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightScheme(Section):
    """How a weight [N, K] is stored."""

    format: Literal["int2", "int3", "int4", "int5", "int6", "int7", "int8", "float8_e4m3fn"] = (
        Field("int8", description="number format of the codes")
    )
    symmetric: bool = Field(True, description="zero point fixed at zero")
    granularity: Literal["tensor", "channel", "group"] = Field(
        "channel", description="which weights share one scale"
    )
    group_size: Annotated[int, Field(ge=8)] | None = Field(
        None, description="weights along the input that share one scale (granularity: group)"
    )
    scale_dtype: DTypeName = Field(
        "float32", description="dtype of the stored scales (default: float16 for groups)"
    )
    signed_scale: bool = Field(
        False,
        description="scales may be negative, which gives the larger end of a range the extra code "
        "-2^(b-1) (default: true for symmetric formats below 8 bits)",
    )
    power_of_two_scale: bool = Field(False, description="scales rounded up to powers of two")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            if data.get("group_size") is not None:
                data.setdefault("granularity", "group")
            if data.get("granularity") == "group":
                data.setdefault("scale_dtype", "float16")
            below = str(data.get("format")) in _BELOW_EIGHT
            if data.get("symmetric", True) is True and below:
                data.setdefault("signed_scale", True)
        return data

    @model_validator(mode="after")
    def _group_size_goes_with_group(self) -> Self:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                "granularity 'group' needs a group_size (for example 64), "
                "and a group_size needs granularity 'group'"
            )
        if self.signed_scale and not self.symmetric:
            raise ValueError("signed_scale needs symmetric: true")
        if self.format not in INTEGERS and (self.signed_scale or not self.symmetric):
            raise ValueError(f"format {self.format} is symmetric, without signed_scale")
        return self

    @property
    def number_format(self) -> Format:
        return FORMATS[self.format]

    @property
    def int_format(self) -> IntFormat:
        """For what works on integers only."""
        return INTEGERS[self.format]

    @property
    def granularity_value(self) -> Granularity:
        return Granularity(self.granularity, self.group_size)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return torch_dtype(self.scale_dtype)


class ActivationScheme(Section):
    """How the input of a layer is quantized: int8, per token as it arrives or per tensor; or
    float8, per token."""

    format: Literal["int8", "float8_e4m3fn"] = Field(
        "int8", description="number format of the codes"
    )
    mode: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="dynamic: one scale per token, from the token itself; "
        "static: one scale per tensor, from calibration",
    )
    symmetric: bool = Field(True, description="zero point fixed at zero")

    @model_validator(mode="after")
    def _float_is_dynamic(self) -> Self:
        if self.format not in INTEGERS and (self.mode == "static" or not self.symmetric):
            raise ValueError(f"activations in {self.format} are dynamic and symmetric")
        return self


class Scheme(Section):
    """What happens to one layer: its weights and, optionally, its activations."""

    weights: WeightScheme = Field(
        default_factory=lambda: WeightScheme.model_validate({}), description="default: int8"
    )
    activations: ActivationScheme | None = Field(None, description="null: left in float")
    input_rotation: Literal["hadamard"] | None = Field(
        None,
        description="how the input's channels are mixed before they are quantized; decided by the "
        "recipe's step rotation",
    )
    input_order: bool = Field(
        False,
        description="the weights of a group are of inputs that are not neighbours (act-order), so "
        "that the layer sorts its input; read from checkpoints of other toolkits",
    )

    @model_validator(mode="after")
    def _one_kind_of_number(self) -> Self:
        a, w = self.activations, self.weights.format
        if a is not None and (a.format in INTEGERS) != (w in INTEGERS):
            raise ValueError(f"{w} weights do not go with {a.format} activations")
        return self

    def __str__(self) -> str:
        w, a = self.weights, self.activations
        kind = {"channel": "", "tensor": "-tensor", "group": f"-g{w.group_size}"}[w.granularity]
        if w.format == FLOAT8.name:
            text = f"fp8{'-a16' if a is None else ''}{kind}"
        else:
            text = f"w{w.number_format.bits}a{16 if a is None else 8}{kind}"
        text += "" if w.symmetric else "-asym"
        if a is not None:
            text += ("-static" if a.mode == "static" else "") + ("" if a.symmetric else "-aasym")
        text += "" if self.input_rotation is None else "-rotated"
        return text + ("-actorder" if self.input_order else "")


def preset(name: str) -> Scheme:
    """The scheme that a name such as ``w8a8``, ``w4a16-g64-asym`` or ``w8a8-static`` stands for.

    Raises:
        ValueError: the name is not ``fp8`` or ``fp8-a16`` and does not follow the grammar
            ``wBaB[-gN|-tensor][-asym][-static]``.
    """
    if name in _FLOATS:
        asked = {"weights": {"format": FLOAT8.name}, "activations": _FLOATS[name]}
        return Scheme.model_validate(asked)
    match = _PRESET.fullmatch(name)
    if match is None:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown scheme {name!r}: {hint}known presets: {', '.join(PRESETS)}")
    if match["static"] and match["abits"] != "8":
        raise ValueError(f"scheme {name!r}: 'static' needs 8-bit activations, as in w8a8-static")
    weights: dict[str, Any] = {"format": f"int{match['bits']}", "symmetric": not match["asym"]}
    if match["group"]:
        weights["group_size"] = int(match["group"])
    elif match["tensor"]:
        weights["granularity"] = "tensor"
    activations = None
    if match["abits"] == "8":
        activations = {"mode": "static" if match["static"] else "dynamic"}
    return Scheme.model_validate({"weights": weights, "activations": activations})


def _scheme_from_name(value: Any) -> Any:
    return preset(value) if isinstance(value, str) else value


def _scheme_or_float(value: Any) -> Any:
    return None if value == "float" else _scheme_from_name(value)


SchemeName = Annotated[
    str,
    Field(
        title="name of a scheme",
        pattern=SCHEME_PATTERN,
        examples=list(PRESETS),
        description="wBaB[-gN|-tensor][-asym][-static], fp8 or fp8-a16",
    ),
]
"""What a scheme may be given as, beside its full form; for the JSON schema."""
Float = Literal["float"]

SchemeField = Annotated[
    Scheme, BeforeValidator(_scheme_from_name, json_schema_input_type=Scheme | SchemeName)
]
SchemeOrFloat = Annotated[
    Scheme | None,
    BeforeValidator(_scheme_or_float, json_schema_input_type=Scheme | SchemeName | Float | None),
]


class Rule(Section):
    """Layers, by name, and the scheme that they get. Later rules win."""

    layers: str = Field(
        description="glob over layer names, or 're:' and a regular expression",
        examples=["*.mlp.down_proj", "lm_head", r"re:model\.layers\.(0|29)\..*"],
    )
    scheme: SchemeOrFloat = Field(description="a preset, a full scheme, or 'float'")

    @field_validator("layers")
    @classmethod
    def _regex_compiles(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                raise ValueError(f"not a regular expression: {value[3:]!r} ({error})") from error
        return value


class Plugin(Section):
    """A named plugin and its options; the plugin's own file checks the options."""

    name: str = Field(description="of the plugin")
    options: dict[str, Any] = Field(default_factory=dict, description="of the plugin")


def _plugin_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _list_from_one(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


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


def _model_from_id(value: Any) -> Any:
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
        Plugin, BeforeValidator(_plugin_from_name, json_schema_input_type=Plugin | str)
    ] = Field(
        default_factory=lambda: Plugin(name="minmax"),
        description="minmax, moving_average, percentile, mse or entropy",
    )


TextsField = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
"""Several texts; one alone needs no list."""


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


def _text_from_source(value: Any) -> Any:
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


class KVCacheConfig(Section):
    """How keys and values [batch, heads, tokens, head_dim] are kept while a model generates.

    Keys have channels of large magnitude, values do not: keys are quantized per channel, values per
    token (Liu et al. 2024, KIVI, section 3). The defaults depend on ``bits``: int8 is symmetric and
    without a window; int4 has zero points and a window of 64.
    """

    bits: Literal[4, 8] = Field(8, description="of a code")
    keys: Literal["token", "channel"] = Field(
        "channel",
        description="token: channels of a token share a scale; channel: tokens of a channel do",
    )
    values: Literal["token", "channel"] = Field("token", description="likewise")
    key_group_size: Annotated[int, Field(ge=8)] | None = Field(
        None,
        description="per token: channels that share a scale (default: all of a head); per channel: "
        "tokens (default: 64)",
    )
    value_group_size: Annotated[int, Field(ge=8)] | None = Field(None, description="likewise")
    symmetric: bool = Field(True, description="zero point fixed at zero")
    window: Annotated[int, Field(ge=0)] = Field(0, description="newest tokens that stay float")
    scale_dtype: Literal["float8_e5m2", "float16", "bfloat16", "float32"] = Field(
        "float8_e5m2", description="dtype of the kept scales, which are rounded up"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        few = {"symmetric": False, "window": 64} if data.get("bits") == 4 else {}
        data = {"keys": "channel", **few, **data}
        for name in ("key", "value"):
            if data.get(f"{name}s") == "channel" and data.get(f"{name}_group_size") is None:
                data[f"{name}_group_size"] = 64
        return data

    def __str__(self) -> str:
        kinds = [
            f"{name}s per {axis}" + ("" if size is None else f" in groups of {size}")
            for name, axis, size in (
                ("key", self.keys, self.key_group_size),
                ("value", self.values, self.value_group_size),
            )
        ]
        zero = "symmetric" if self.symmetric else "with zero points"
        return f"int{self.bits} {zero}, {', '.join(kinds)}, newest {self.window} tokens float"


def _cache_from_name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in ("int8", "int4"):
        raise ValueError(
            f"unknown kind of cache {value!r}: give int8, int4, or a mapping such as "
            "{bits: 4, window: 128}"
        )
    return {"bits": int(value[3:])}


KVCacheField = Annotated[
    KVCacheConfig,
    BeforeValidator(
        _cache_from_name, json_schema_input_type=KVCacheConfig | Literal["int8", "int4"]
    ),
]


def cache_config(value: "str | dict[str, Any] | KVCacheConfig") -> KVCacheConfig:
    """The settings of a quantized cache, from ``"int8"``, ``"int4"`` or a mapping.

    Raises:
        ConfigError: with one line per mistake.
    """
    if isinstance(value, KVCacheConfig):
        return value
    try:
        raw = _cache_from_name(value)
    except ValueError as error:
        raise ConfigError(f"kv_cache: {error}") from None
    return _validate(KVCacheConfig, raw, "kv_cache", None)


def _output_from_dir(value: Any) -> Any:
    return {"dir": value} if isinstance(value, str) else value


class QuantizationConfig(Section):
    """Everything that a run needs. ``scheme`` alone is enough for :func:`ptq.quantize`."""

    scheme: SchemeField = Field(description="a preset such as w8a8 or w4a16-g64, or a mapping")
    model: Annotated[
        ModelConfig | None,
        BeforeValidator(_model_from_id, json_schema_input_type=ModelConfig | Named | None),
    ] = Field(
        None,
        description="the float model: its id alone, or a mapping",
        examples=["HuggingFaceTB/SmolLM2-360M-Instruct"],
    )
    rules: list[Rule] = Field(default_factory=list, description="per layer; later rules win")
    embeddings: SchemeOrFloat = Field(
        None,
        description="weight-only scheme of the token embedding, such as w8a16, or float; "
        "an output head tied to it shares it",
    )
    recipe: Annotated[
        list[
            Annotated[
                Plugin, BeforeValidator(_plugin_from_name, json_schema_input_type=Plugin | str)
            ]
        ],
        BeforeValidator(_list_from_one, json_schema_input_type=list[Plugin | str] | Plugin | str),
    ] = Field(
        default_factory=lambda: [Plugin(name="rtn")],
        description="steps, in order: transforms (smoothquant, awq, rotation), one algorithm (rtn, "
        "gptq, gptaq, hqq), refinements (learned_rounding); each a name, or name and options; or "
        "auto: what measured best for the scheme",
    )
    tied_embeddings: Literal["keep", "untie"] = Field(
        "keep",
        description="keep: an output head tied to the embedding stays tied, and float unless "
        "'embeddings' quantizes both; untie: rules may quantize the head by itself",
    )
    calibration: Annotated[
        CalibrationConfig | None,
        BeforeValidator(
            _text_from_source, json_schema_input_type=CalibrationConfig | Sources | str | None
        ),
    ] = Field(
        None,
        description="the text that recipes and static activations look at",
        examples=["calibration_data/calibration.jsonl"],
    )
    evaluation: Annotated[
        EvaluationConfig | None,
        BeforeValidator(
            _text_from_source, json_schema_input_type=EvaluationConfig | Sources | str | None
        ),
    ] = Field(
        None,
        description="held-out text on which float and quantized are compared",
        examples=["calibration_data/evaluation.jsonl"],
    )
    generation: GenerationConfig | None = Field(
        None, description="a sample of text before and after"
    )
    kv_cache: KVCacheField | None = Field(
        None,
        description="int8, int4 or a mapping: how model.generate keeps keys and values (null: "
        "in float)",
    )
    output: Annotated[
        OutputConfig | None,
        BeforeValidator(_output_from_dir, json_schema_input_type=OutputConfig | Named | None),
    ] = Field(
        None,
        description="where the checkpoint goes: its directory alone, or a mapping",
        examples=["out/my-model-w4"],
    )

    @model_validator(mode="after")
    def _rotation_is_a_step(self) -> Self:
        schemes = (self.scheme, self.embeddings, *(rule.scheme for rule in self.rules))
        if any(scheme is not None and scheme.input_rotation is not None for scheme in schemes):
            raise ValueError(
                "input_rotation is decided for each layer by the recipe; "
                "leave it out of the scheme and add the step: recipe: [rotation, rtn]"
            )
        return self

    @model_validator(mode="after")
    def _order_is_read(self) -> Self:
        schemes = (self.scheme, self.embeddings, *(rule.scheme for rule in self.rules))
        if any(scheme is not None and scheme.input_order for scheme in schemes):
            raise ValueError(
                "input_order is what a checkpoint of another toolkit has; leave it out: gptq "
                "chooses the order of its columns by itself and keeps groups of neighbours"
            )
        return self

    @field_validator("embeddings")
    @classmethod
    def _looked_up(cls, value: Scheme | None) -> Scheme | None:
        if value is not None and value.activations is not None:
            raise ValueError(
                f"{value} has quantized activations, but rows of an embedding are looked up; "
                f"give a weight-only scheme such as w{value.weights.number_format.bits}a16"
            )
        return value


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` to ``torch.bfloat16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def as_config(value: "str | dict[str, Any] | Scheme | QuantizationConfig") -> QuantizationConfig:
    """A configuration from a preset's name, a mapping, a scheme or a configuration.

    Raises:
        ConfigError: with one line per mistake.
    """
    if isinstance(value, QuantizationConfig):
        return value
    whole = isinstance(value, dict) and not (value and value.keys() <= Scheme.model_fields.keys())
    raw = value if whole and isinstance(value, dict) else {"scheme": value}
    return _validate(QuantizationConfig, raw, "configuration", None)


def make_section(section: type[S], source: str, **values: Any) -> S:
    """A section from keyword arguments of the API.

    Args:
        source: what the arguments belong to, for the error.

    Raises:
        ConfigError: with one line per mistake.
    """
    return _validate(section, values, source, None)


def load_config(
    path: str | Path, overrides: "list[str] | tuple[str, ...]" = ()
) -> QuantizationConfig:
    """Read a YAML file and apply ``key.subkey=value`` overrides (values are YAML).

    Raises:
        ConfigError: the file is missing or is not YAML, a key is unknown, a value has the wrong
            type; the message has the file and the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}; ready ones are in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory, not a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path} holds {found}, not keys and values such as 'scheme: w8a8'")
    if node is not None:
        _refuse_duplicates(node, path)
    for override in overrides:
        _apply_override(raw, override)
    return _validate(QuantizationConfig, raw, str(path), node)


def with_conditions(config: QuantizationConfig, texts: Sequence[str]) -> QuantizationConfig:
    """The configuration with more conditions in ``evaluation.fail_if``.

    Raises:
        ConfigError: there is no evaluation that they could judge.
    """
    if not texts:
        return config
    section = config.evaluation
    if section is None:
        raise ConfigError("--fail-if needs figures: add a section 'evaluation:' with 'data: FILE'")
    more = section.model_copy(update={"fail_if": [*section.fail_if, *texts]})
    return config.model_copy(update={"evaluation": more})


def _one_line(error: yaml.YAMLError | ValueError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _refuse_duplicates(node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(child, path)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"{path}, line {line}: key {key.value!r} is given twice")
            seen.add(key.value)
            _refuse_duplicates(child, path)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, as in --set scheme=w8a16")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {override!r}: value is not YAML: {_one_line(error)}") from None
    *parents, last = key.split(".")
    target: Any = raw
    for depth, name in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        target = _descend(target, name, where, override)
    if isinstance(target, list):
        target[_index(target, last, key, override)] = value
    else:
        target[last] = value


def _descend(target: Any, name: str, where: str, override: str) -> Any:
    """The container below ``target`` called ``name``; a shorthand string becomes its mapping."""
    shorthand = {"model": "id", "output": "dir", "calibration": "data", "evaluation": "data"}
    if isinstance(target, list):
        return target[_index(target, name, where, override)]
    child = target.get(name)
    if child is None:
        child = target[name] = {}
    elif isinstance(child, str) and where in shorthand:
        child = target[name] = {shorthand[where]: child}
    elif not isinstance(child, dict | list):
        raise ConfigError(f"--set {override!r}: {where} is {child!r}, it has no keys below it")
    return child


def _index(target: list[Any], name: str, where: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(target):
        found = f"an index from 0 to {len(target) - 1}" if target else "items, the list is empty"
        raise ConfigError(f"--set {override!r}: {where}: expected {found}")
    return int(name)


def _validate(section: type[S], raw: dict[str, Any], source: str, node: yaml.Node | None) -> S:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(detail, section, source, node) for detail in error.errors()]
        raise ConfigError("; ".join(dict.fromkeys(lines))) from None


def _explain(detail: Any, section: type[BaseModel], source: str, node: yaml.Node | None) -> str:
    loc = detail["loc"]
    line = _line_of(node, loc)
    where = f"{source}, line {line}" if line else source
    key = ".".join(str(part) for part in loc)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(section, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {hint}"
    if detail["type"] == "missing":
        return f"{where}: key {key!r} is required"
    message = _WORDS.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    message = message[0].lower() + message[1:]
    if "unknown scheme" in message or "scheme '" in message:
        return f"{where}: {key}: {message}"
    return f"{where}: {key}: {message}, got {detail['input']!r}"


_WORDS = {
    "model_type": "expected a mapping of keys and values",
    "dict_type": "expected a mapping of keys and values",
    "list_type": "expected a list",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must not be blank",
}


def _line_of(node: yaml.Node | None, loc: tuple[Any, ...]) -> int | None:
    """The line, from one, of the deepest part of ``loc`` that the file holds."""
    line: int | None = None
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            match = next(((k, v) for k, v in node.value if k.value == part), None)
            if match is None:
                return line
            line, node = match[0].start_mark.line + 1, match[1]
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _known_keys(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The keys of the section at ``loc``."""
    for part in loc:
        if isinstance(part, int):
            continue
        inner = _section_in(model.model_fields[part].annotation)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, Annotated):
        for arg in typing.get_args(annotation):
            found = _section_in(arg)
            if found is not None:
                return found
    return None
