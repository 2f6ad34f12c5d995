"""What happens to a layer: formats, scales and zero points of its weights and activations."""

import difflib
import re
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator

from ptq.config.section import DTypeName, Section, torch_dtype
from ptq.core import Granularity
from ptq.formats import FLOAT8, FORMATS, INTEGERS, Format, IntFormat
from ptq.presets import PRESETS, SCHEME_PATTERN

_PRESET = re.compile(
    r"w(?P<bits>[2-8])a(?P<abits>16|8)(-g(?P<group>\d+)|(?P<tensor>-tensor))?"
    r"(?P<asym>-asym)?(?P<static>-static)?"
)
_FLOATS = {"fp8": {"format": FLOAT8.name}, "fp8-a16": None}
"""Presets of floating-point weights, with their activations."""
# A list: a value from YAML may have no hash.
_BELOW_EIGHT = [name for name, fmt in INTEGERS.items() if fmt.bits < 8]


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
        "that the layer sorts its input; decided by the recipe's step gptq (act_order: permuted)",
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
