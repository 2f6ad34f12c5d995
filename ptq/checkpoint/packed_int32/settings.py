"""``quantization_config`` of config.json: bits, group size and layout, of all layers or of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from ptq.checkpoint.patterns import matches
from ptq.errors import CheckpointError, UnsupportedError

LayoutName = Literal["gptq", "gptq-v2", "awq"]
BITS: dict[LayoutName, tuple[int, ...]] = {
    "gptq": (2, 3, 4, 8),
    "gptq-v2": (2, 3, 4, 8),
    "awq": (4,),
}
_NAMES: dict[tuple[str, str], LayoutName] = {
    ("gptq", "gptq"): "gptq",
    ("gptq", "gptq_v2"): "gptq-v2",
    ("awq", "gemm"): "awq",
}
_DEFAULT = {"gptq": "gptq", "awq": "gemm"}


class _Section(BaseModel):
    """The keys that say what the tensors mean; the others say how they came about."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    bits: int = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(validation_alias=AliasChoices("group_size", "q_group_size"))
    sym: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Settings:
    """How a layer is stored.

    Args:
        group_size: -1: one group for the whole row.
        symmetric: its zero points are said to be in the middle.
    """

    bits: int
    group_size: int
    symmetric: bool

    def group(self, columns: int) -> int | None:
        """The group size of a row of this length; None if there is one group for all of it."""
        return None if self.group_size == -1 or self.group_size > columns else self.group_size


@dataclass(frozen=True)
class AllSettings:
    """Those of every layer: what holds for all, and GPTQModel's ``dynamic`` rules."""

    layout: LayoutName
    common: Settings
    dynamic: Mapping[str, Mapping[str, Any]]

    def of(self, names: Sequence[str]) -> Settings:
        """Those of one layer: the first rule whose expression matches its name changes them.

        Args:
            names: all that the layer may be called, one at least.

        Raises:
            CheckpointError: the rule says that the layer is float, or is no rule.
            UnsupportedError: its bits or group size are none that ptq has.
        """
        settings, name = self.common, names[0]
        for pattern, changed in self.dynamic.items():
            expression = pattern.removeprefix("+:").removeprefix("-:")
            where = "quantization_config.dynamic"
            if not any(matches(expression, other, where) for other in names):
                continue
            if pattern.startswith("-:"):
                raise CheckpointError(
                    f"layer {name} is float by the rule {pattern!r} of quantization_config.dynamic,"
                    " but the files hold codes of it; copy the checkpoint again"
                )
            settings = _changed(settings, changed, name)
            break
        _check(settings, self.layout, name)
        return settings


def layout_name(section: Mapping[str, Any]) -> LayoutName | None:
    """The layout that a ``quantization_config`` names; None if ptq does not read it."""
    method = section.get("quant_method")
    if not isinstance(method, str) or method not in _DEFAULT:
        return None
    keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
    found = next((section[key] for key in keys if section.get(key)), _DEFAULT[method])
    return _NAMES.get((method, str(found).lower()))


def parse_settings(section: Mapping[str, Any], source: Path) -> AllSettings:
    """The settings of a ``quantization_config`` of GPTQ or AWQ.

    Raises:
        CheckpointError: it is not one.
        UnsupportedError: its layout is one that ptq does not read.
    """
    name = layout_name(section)
    if name is None:
        shown = {k: section.get(k) for k in ("quant_method", "checkpoint_format", "version")}
        raise UnsupportedError(
            f"{source}: quantization_config {shown} is no layout that ptq reads: gptq, gptq_v2, "
            "and version gemm of awq; quantize the float model that it was made from: ptq.quantize"
        )
    try:
        found = _Section.model_validate(dict(section))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{source}: quantization_config.{where}: {first['msg']}") from None
    common = Settings(found.bits, found.group_size, found.sym and name != "awq")
    return AllSettings(name, common, found.dynamic or {} if name != "awq" else {})


def _changed(settings: Settings, rule: Mapping[str, Any], name: str) -> Settings:
    bits = rule.get("bits", settings.bits)
    size = rule.get("group_size", settings.group_size)
    symmetric = rule.get("sym", settings.symmetric)
    if (type(bits), type(size), type(symmetric)) != (int, int, bool):
        raise CheckpointError(f"layer {name}: quantization_config.dynamic has the rule {rule!r}")
    return Settings(bits, size, symmetric)


def _check(settings: Settings, layout: LayoutName, name: str) -> None:
    if settings.bits not in BITS[layout]:
        raise UnsupportedError(
            f"layer {name} has {settings.bits} bits, {layout} with "
            f"{', '.join(map(str, BITS[layout]))} is what ptq reads; quantize again"
        )
    if settings.group_size != -1 and settings.group_size < 8:
        raise UnsupportedError(
            f"layer {name} has group size {settings.group_size}, ptq has groups of 8 and more, or "
            "-1 for the whole row; quantize again"
        )
