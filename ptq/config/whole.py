"""The whole YAML file, and what else may be given for it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ptq.config.kv_cache import KVCacheField
from ptq.config.mistakes import validate
from ptq.config.scheme import Rule, Scheme, SchemeField, SchemeOrFloat
from ptq.config.section import Named, Plugin, Section, Sources, plugin_from_name
from ptq.config.sections import (
    CalibrationConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OutputConfig,
    model_from_id,
    output_from_dir,
    text_from_source,
)
from ptq.errors import ConfigError


def _list_from_one(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


class QuantizationConfig(Section):
    """Everything that a run needs. ``scheme`` alone is enough for :func:`ptq.quantize`."""

    scheme: SchemeField = Field(description="a preset such as w8a8 or w4a16-g64, or a mapping")
    model: Annotated[
        ModelConfig | None,
        BeforeValidator(model_from_id, json_schema_input_type=ModelConfig | Named | None),
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
                Plugin, BeforeValidator(plugin_from_name, json_schema_input_type=Plugin | str)
            ]
        ],
        BeforeValidator(_list_from_one, json_schema_input_type=list[Plugin | str] | Plugin | str),
    ] = Field(
        default_factory=lambda: [Plugin(name="rtn")],
        description="steps, in order: preparations (residual_rotation), transforms (smoothquant, "
        "awq, rotation), one algorithm (rtn, gptq, gptaq, hqq), refinements (learned_rounding); "
        "each a name, or name and options; or auto: what measured best for the scheme",
    )
    tied_embeddings: Literal["keep", "untie"] = Field(
        "keep",
        description="keep: an output head tied to the embedding stays tied, and float unless "
        "'embeddings' quantizes both; untie: rules may quantize the head by itself, and "
        "residual_rotation gives it a weight of its own",
    )
    calibration: Annotated[
        CalibrationConfig | None,
        BeforeValidator(
            text_from_source, json_schema_input_type=CalibrationConfig | Sources | str | None
        ),
    ] = Field(
        None,
        description="the text that recipes and static activations look at",
        examples=["calibration_data/calibration.jsonl"],
    )
    evaluation: Annotated[
        EvaluationConfig | None,
        BeforeValidator(
            text_from_source, json_schema_input_type=EvaluationConfig | Sources | str | None
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
        BeforeValidator(output_from_dir, json_schema_input_type=OutputConfig | Named | None),
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
    def _order_is_an_option(self) -> Self:
        schemes = (self.scheme, self.embeddings, *(rule.scheme for rule in self.rules))
        if any(scheme is not None and scheme.input_order for scheme in schemes):
            raise ValueError(
                "input_order is decided for each layer by the recipe; leave it out of the scheme "
                "and give gptq the option act_order: permuted"
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


def as_config(value: "str | dict[str, Any] | Scheme | QuantizationConfig") -> QuantizationConfig:
    """A configuration from a preset's name, a mapping, a scheme or a configuration.

    Raises:
        ConfigError: with one line per mistake.
    """
    if isinstance(value, QuantizationConfig):
        return value
    whole = isinstance(value, dict) and not (value and value.keys() <= Scheme.model_fields.keys())
    raw = value if whole and isinstance(value, dict) else {"scheme": value}
    return validate(QuantizationConfig, raw, "configuration", None)


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
