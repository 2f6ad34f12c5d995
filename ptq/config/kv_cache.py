"""How the keys and values of a model that generates are kept."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ptq.config.mistakes import validate
from ptq.config.section import Section
from ptq.errors import ConfigError


class KVCacheConfig(Section):
    """How keys and values [batch, heads, tokens, head_dim] are kept while a model generates.

    Keys have channels of large magnitude, values do not: keys are quantized per channel, values per
    token (Liu et al. 2024, KIVI, section 3). The defaults depend on ``bits``: int8 is symmetric and
    without a window; int4 has zero points and a window of 64. Static scales are for all tokens, so
    nothing is kept beside the codes. Values are per channel then, keys per head: rotary positions
    carry a channel of the keys out of its range in texts longer than those of the calibration.
    """

    bits: Literal[4, 8] = Field(8, description="of a code")
    mode: Literal["dynamic", "static"] = Field(
        "dynamic",
        description="dynamic: scales from the tokens themselves, kept beside their codes; "
        "static: from calibration, the same for all tokens",
    )
    keys: Literal["token", "channel", "head", "tensor"] = Field(
        "channel",
        description="what shares a scale. Dynamic: token (channels of a token) or channel (tokens "
        "of a channel); static, for all tokens: channel, head (default) or tensor (a whole layer)",
    )
    values: Literal["token", "channel", "head", "tensor"] = Field(
        "token", description="likewise (static: channel)"
    )
    key_group_size: Annotated[int, Field(ge=8)] | None = Field(
        None,
        description="per token: channels that share a scale (default: all of a head); per channel: "
        "tokens (default: 64); static: none",
    )
    value_group_size: Annotated[int, Field(ge=8)] | None = Field(None, description="likewise")
    symmetric: bool = Field(True, description="zero point fixed at zero")
    window: Annotated[int, Field(ge=0)] = Field(0, description="newest tokens that stay float")
    scale_dtype: Literal["float8_e5m2", "float16", "bfloat16", "float32"] = Field(
        "float8_e5m2",
        description="dtype of the kept scales, which are rounded up (static: bfloat16)",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        few = {"symmetric": False, "window": 64} if data.get("bits") == 4 else {}
        if data.get("mode") == "static":
            return {
                "keys": "head",
                "values": "channel",
                "scale_dtype": "bfloat16",
                **few,
                **data,
            }
        data = {"keys": "channel", **few, **data}
        for name in ("key", "value"):
            if data.get(f"{name}s") == "channel" and data.get(f"{name}_group_size") is None:
                data[f"{name}_group_size"] = 64
        return data

    @model_validator(mode="after")
    def _axes_go_with_mode(self) -> Self:
        for name, axis, size in self._axes:
            if self.static and axis == "token":
                raise ValueError(
                    f"{name}s: token has scales of single tokens, which are dynamic; with mode: "
                    "static choose channel, head or tensor"
                )
            if self.static and size is not None:
                raise ValueError(
                    f"{name}_group_size: static scales have no groups of tokens; leave it out"
                )
            if not self.static and axis in ("head", "tensor"):
                raise ValueError(f"{name}s: {axis} needs mode: static; choose token or channel")
        return self

    @property
    def static(self) -> bool:
        """Whether the scales come from calibration."""
        return self.mode == "static"

    @property
    def format(self) -> str:
        """Of the codes."""
        return f"int{self.bits}"

    @property
    def _axes(self) -> tuple[tuple[str, str, int | None], ...]:
        return (
            ("key", self.keys, self.key_group_size),
            ("value", self.values, self.value_group_size),
        )

    def __str__(self) -> str:
        kinds = [
            f"{name}s per {axis}" + ("" if size is None else f" in groups of {size}")
            for name, axis, size in self._axes
        ]
        zero = "symmetric" if self.symmetric else "with zero points"
        static = " static" if self.static else ""
        return (
            f"{self.format}{static} {zero}, {', '.join(kinds)}, newest {self.window} tokens float"
        )


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
    return validate(KVCacheConfig, raw, "kv_cache", None)
