"""The ``quantization_config`` of config.json: which layer has which scheme."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from ptq.checkpoint.patterns import matches
from ptq.config import ActivationScheme, Scheme, WeightScheme
from ptq.errors import CheckpointError, UnsupportedError
from ptq.formats import FLOAT8

METHOD = "compressed-tensors"
Layout = Literal["int-quantized", "float-quantized", "pack-quantized"]
_LAYOUTS: dict[tuple[str, str], Layout] = {
    ("int-quantized", "int"): "int-quantized",
    ("naive-quantized", "int"): "int-quantized",
    ("float-quantized", "float"): "float-quantized",
    ("naive-quantized", "float"): "float-quantized",
    ("pack-quantized", "int"): "pack-quantized",
}
"""By what the format is called and the type of the weights."""
_BITS = range(2, 9)


class Arguments(BaseModel):
    """How one tensor is quantized; what is not listed here would change what its codes mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool | str = False
    block_structure: Any = None
    actorder: Any = None
    scale_dtype: Any = None
    zp_dtype: Any = None
    observer: Any = None
    observer_kwargs: Any = None

    @property
    def kind(self) -> str:
        """The strategy, or what it is by default."""
        if self.strategy is not None:
            return self.strategy
        return {None: "tensor", -1: "channel"}.get(self.group_size, "group")


class Group(BaseModel):
    """The layers that match ``targets`` (a name, ``re:`` expression or class), and their scheme."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: tuple[str, ...]
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    output_activations: Arguments | None = None
    format: str | None = None


class Groups(BaseModel):
    """All of it; further keys say nothing that reading needs."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    config_groups: dict[str, Group]
    format: str
    ignore: tuple[str, ...] | None = None
    kv_cache_scheme: Any = None
    sparsity_config: Any = None
    transform_config: Any = None
    quantization_status: str | None = None


def parse_groups(data: Mapping[str, Any], source: Path) -> Groups:
    """The groups of a ``quantization_config``.

    Raises:
        CheckpointError: it is not one.
        UnsupportedError: it asks for what ptq cannot do; the key is named.
    """
    try:
        groups = Groups.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{source}: quantization_config.{where}: {first['msg']}") from None
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if getattr(groups, key):
            raise UnsupportedError(
                f"{source}: quantization_config.{key} is set, which ptq cannot load; "
                "quantize again without it"
            )
    if groups.quantization_status not in (None, "compressed"):
        raise UnsupportedError(
            f"{source}: quantization_status is {groups.quantization_status!r}, so its weights are "
            "not codes; save it compressed (llm-compressor: save_compressed=True)"
        )
    return groups


def group_of(groups: Groups, names: Sequence[str], module: nn.Module) -> Group | None:
    """The group of a layer, None if it is float: a target that is its name wins over an
    expression, and that over its class; a later group with the same target over an earlier one.

    Args:
        names: all that the layer may be called.
    """
    if any(_matches(names, module, target) for target in groups.ignore or ()):
        return None
    by_target = {t: group for group in groups.config_groups.values() for t in group.targets}
    named = sorted(by_target, key=lambda t: ("re:" in t, t))
    found = [t for t in named if _matches_name(names, t)]
    found += [t for t in named if _matches_class(module, t)]
    return by_target[found[0]] if found else None


def _matches(names: Sequence[str], module: nn.Module, target: str) -> bool:
    return _matches_name(names, target) or _matches_class(module, target)


def _matches_name(names: Sequence[str], target: str) -> bool:
    if not target.startswith("re:"):
        return target in names
    expression = target[3:]
    return any(matches(expression, name, "quantization_config.config_groups") for name in names)


def _matches_class(module: nn.Module, target: str) -> bool:
    return any(cls.__name__ == target for cls in type(module).__mro__)


def layout_of(group: Group, groups: Groups, name: str) -> Layout:
    """How the codes of the group are stored.

    Raises:
        UnsupportedError: in a way that ptq does not read.
    """
    found = group.format or groups.format
    kind = "int" if group.weights is None else group.weights.type
    if (found, kind) in _LAYOUTS:
        return _LAYOUTS[found, kind]
    raise UnsupportedError(
        f"layer {name} is stored as {found!r} with {kind} weights; ptq reads int-quantized, "
        "float-quantized (fp8) and pack-quantized; quantize the float model: ptq.quantize"
    )


def scheme_of(group: Group, name: str, scale_dtype: str, signed: bool) -> Scheme:
    """The scheme that a group describes.

    Args:
        scale_dtype: of the stored scales, as in ``"bfloat16"``.
        signed: some of the scales are negative.

    Raises:
        UnsupportedError: ptq has no such scheme.
    """
    weights = group.weights
    number = None if weights is None else _number_format(weights)
    if weights is None or number is None:
        raise _unsupported(name, "weights", weights)
    if weights.kind not in ("tensor", "channel", "group") or weights.dynamic:
        raise _unsupported(name, "weights", weights)
    if group.output_activations is not None:
        raise _unsupported(name, "output_activations", group.output_activations)
    grouped = weights.kind == "group"
    if grouped and (weights.group_size is None or weights.group_size < 8):
        raise _unsupported(name, "weights", weights)
    made = WeightScheme.model_validate(
        {
            "format": number,
            "symmetric": weights.symmetric,
            "granularity": weights.kind,
            "group_size": weights.group_size if grouped else None,
            "scale_dtype": scale_dtype,
            "signed_scale": signed and weights.symmetric and number != FLOAT8.name,
        }
    )
    activations = _activations(group.input_activations, weights.type, name)
    return Scheme(weights=made, activations=activations)


def _number_format(weights: Arguments) -> str | None:
    """The name of the codes' format; None if ptq has none."""
    if weights.type == "float" and weights.num_bits == 8 and weights.symmetric:
        return FLOAT8.name
    return f"int{weights.num_bits}" if weights.type == "int" and weights.num_bits in _BITS else None


def _activations(found: Arguments | None, kind: str, name: str) -> ActivationScheme | None:
    """The scheme of the inputs of weights of this kind, int or float."""
    if found is None:
        return None
    modes: dict[tuple[str, bool | str], Literal["dynamic", "static"]] = {
        ("token", True): "dynamic",
        ("tensor", False): "static",
    }
    mode = modes.get((found.kind, found.dynamic))
    if mode is None or (found.type, found.num_bits) != (kind, 8):
        raise _unsupported(name, "input_activations", found)
    if kind == "int":
        return ActivationScheme(mode=mode, symmetric=found.symmetric)
    if mode == "static" or not found.symmetric:
        raise _unsupported(name, "input_activations", found)
    return ActivationScheme(format="float8_e4m3fn")


def _unsupported(name: str, what: str, found: Arguments | None) -> UnsupportedError:
    said = found and found.model_dump(exclude_none=True, exclude_defaults=True)
    return UnsupportedError(
        f"layer {name}: {what} {said} is no scheme of ptq: int weights of 2 to 8 bits per tensor, "
        "channel or group of at least 8, int8 inputs per token (dynamic) or tensor (static); or "
        "fp8 weights, symmetric, and fp8 inputs per token (FP8_DYNAMIC of llm-compressor)"
    )


def layout_for(scheme: Scheme) -> Layout:
    """How the format stores the codes of a scheme: integers packed where the inputs stay float."""
    if scheme.weights.format == FLOAT8.name:
        return "float-quantized"
    return "pack-quantized" if scheme.activations is None else "int-quantized"


def quantization_config(schemes: Mapping[str, Scheme], ignore: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of these layers.

    With one scheme, the group targets every ``Linear``; with several, each names its layers.

    Args:
        ignore: the linear layers that stay float.
    """
    members: dict[str, list[str]] = {}
    bodies: dict[str, dict[str, Any]] = {}
    for name, scheme in schemes.items():
        body = _group_body(scheme)
        members.setdefault(repr(body), []).append(name)
        bodies[repr(body)] = body
    one = len(bodies) == 1
    formats = {body["format"] for body in bodies.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if one else members[key], **body}
            for i, (key, body) in enumerate(bodies.items())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group_body(scheme: Scheme) -> dict[str, Any]:
    weights, inputs = scheme.weights, scheme.activations
    made = {
        "num_bits": weights.number_format.bits,
        "type": "float" if weights.format == FLOAT8.name else "int",
        "symmetric": weights.symmetric,
        "strategy": weights.granularity,
        "group_size": weights.group_size,
        "dynamic": False,
    }
    arguments = None
    if inputs is not None:
        dynamic = inputs.mode == "dynamic"
        arguments = {
            **made,
            "num_bits": 8,
            "symmetric": inputs.symmetric,
            "strategy": "token" if dynamic else "tensor",
            "group_size": None,
            "dynamic": dynamic,
        }
    return {
        "weights": made,
        "input_activations": arguments,
        "output_activations": None,
        "format": layout_for(scheme),
    }
