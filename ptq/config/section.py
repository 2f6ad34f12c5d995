"""What every part of the configuration is made of."""

from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

DTypeName = Literal["float32", "float16", "bfloat16"]
DTypeNameOrAuto = Literal["float32", "float16", "bfloat16", "auto"]

Named = Annotated[str, Field(min_length=1)]
Sources = Annotated[list[str], Field(min_length=1)]


def _texts_from_one(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_texts_from_one, json_schema_input_type=Sources | str)]

NotBlank = Annotated[str, Field(pattern=r"\S")]
Prompts = Annotated[
    list[NotBlank],
    BeforeValidator(
        _texts_from_one,
        json_schema_input_type=Annotated[list[NotBlank], Field(min_length=1)] | NotBlank,
    ),
]
TextsField = Annotated[list[str], BeforeValidator(_texts_from_one)]
"""Several texts; one alone needs no list."""

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Base of every part of the configuration: immutable; nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Plugin(Section):
    """A named plugin and its options; the plugin's own file checks the options."""

    name: str = Field(description="of the plugin")
    options: dict[str, Any] = Field(default_factory=dict, description="of the plugin")


def plugin_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` to ``torch.bfloat16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
