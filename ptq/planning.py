"""The plan: what will happen to every layer, decided from the config and the shapes alone."""

import fnmatch
import html
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq.config import ActivationScheme, QuantizationConfig, Rule, Scheme, as_config
from ptq.core import packed_width
from ptq.errors import ConfigError, UnsupportedError
from ptq.model.layers import LayerInfo, TensorInfo, read_layers
from ptq.modules import quantized_modules


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one module.

    Args:
        name, kind, shape: of the module and its weight.
        parameters: that it owns; a weight shared with an earlier module counts there.
        scheme: None where it stays in float.
        reason: why it stays in float, or "" .
        decided_by: the rule or default that decided.
        bytes_before: of its tensors in the output dtype, unquantized.
        bytes_after: of its tensors in the checkpoint.
        looked_up: it is an embedding.
        shares: name of the quantized embedding that a tied output head shares, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    scheme: Scheme | None
    reason: str
    decided_by: str
    bytes_before: int
    bytes_after: int
    looked_up: bool = False
    shares: str | None = None

    @property
    def outcome(self) -> str:
        """The scheme's name, or 'float' and why."""
        return str(self.scheme) if self.scheme is not None else f"float: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "parameters": self.parameters,
            "scheme": None if self.scheme is None else str(self.scheme),
            "reason": self.reason,
            "decided_by": self.decided_by,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclass(frozen=True)
class Plan:
    """All layers, in the model's order; prints as a table, the repeated layers folded."""

    layers: tuple[LayerPlan, ...]
    dtype: torch.dtype

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.scheme is not None)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Scheme of each linear layer that is quantized by itself."""
        return {
            layer.name: layer.scheme
            for layer in self.layers
            if layer.scheme is not None and not layer.looked_up and layer.shares is None
        }

    @property
    def embeddings(self) -> dict[str, Scheme]:
        """Scheme of each embedding that is quantized."""
        return {x.name: x.scheme for x in self.layers if x.scheme is not None and x.looked_up}

    @property
    def sharing(self) -> dict[str, str]:
        """Output heads that share the quantized embedding, which is named."""
        return {layer.name: layer.shares for layer in self.layers if layer.shares is not None}

    @property
    def static_layers(self) -> dict[str, ActivationScheme]:
        """Layers whose input scale must come from calibration, and how they are quantized."""
        return {
            name: scheme.activations
            for name, scheme in self.schemes.items()
            if scheme.activations is not None and scheme.activations.mode == "static"
        }

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def quantized_share(self) -> float:
        """Fraction of the parameters that are quantized."""
        return sum(layer.parameters for layer in self.quantized) / max(1, self.parameters)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def compression(self) -> float:
        return self.bytes_before / max(1, self.bytes_after)

    def to_dict(self) -> dict[str, Any]:
        return {
            "dtype_of_float_tensors": _dtype_name(self.dtype),
            "parameters": self.parameters,
            "quantized_share_of_parameters": self.quantized_share,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "compression": self.compression,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __str__(self) -> str:
        return self.table()

    def table(self, full: bool = False) -> str:
        """Aligned text; ``full`` gives each layer a row of its own."""
        rows = _rows(self.layers, full)
        widths = [max(len(row[i]) for row in (_HEADER, *rows)) for i in range(len(_HEADER))]
        lines = [
            "  ".join(
                cell.rjust(width) if i in _RIGHT else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (_HEADER, tuple("-" * w for w in widths), *rows)
        ]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """Two lines: what is quantized, and the sizes."""
        float32 = self.parameters * 4
        return (
            f"{len(self.quantized)} of {len(self.layers)} modules and "
            f"{100 * self.quantized_share:.1f}% of {self.parameters:,} parameters are quantized.\n"
            f"{megabytes(self.bytes_before)} ({_dtype_name(self.dtype)}) -> "
            f"{megabytes(self.bytes_after)}: "
            f"{self.compression:.2f}x smaller; "
            f"{float32 / max(1, self.bytes_after):.2f}x against float32."
        )

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in _rows(self.layers, full=False))
        summary = html.escape(self.summary()).replace("\n", "<br>")
        return f"<table>{row(_HEADER, 'th')}{body}</table><p>{summary}</p>"


_HEADER = (
    "layer",
    "x",
    "kind",
    "shape",
    "parameters",
    "MB before",
    "MB after",
    "scheme",
    "decided by",
)
_RIGHT = {1, 4, 5, 6}


def _rows(layers: Iterable[LayerPlan], full: bool) -> list[tuple[str, ...]]:
    """Cells of the table; layers that differ only in a number of their name share a row."""
    folded: dict[Any, list[LayerPlan]] = {}
    for layer in layers:
        name = layer.name if full else re.sub(r"\b\d+\b", "*", layer.name)
        key = (name, layer.kind, layer.shape, layer.outcome, layer.decided_by, layer.parameters > 0)
        folded.setdefault(key, []).append(layer)
    return [
        (
            (members[0].name if len(members) == 1 else key[0]) or "(model)",
            str(len(members)),
            key[1],
            "x".join(map(str, key[2])),
            f"{sum(m.parameters for m in members):,}",
            f"{sum(m.bytes_before for m in members) / 1e6:.2f}",
            f"{sum(m.bytes_after for m in members) / 1e6:.2f}",
            key[3],
            key[4],
        )
        for key, members in folded.items()
    ]


def plan(
    model: nn.Module,
    scheme: str | dict[str, Any] | Scheme | QuantizationConfig,
    *,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Decide the scheme of every layer.

    Args:
        model: may be on the meta device; nothing but shapes is read.
        scheme: a preset's name, a scheme, or a whole configuration.
        dtype: of what stays in float, in the checkpoint (default: each tensor's own).

    Raises:
        ConfigError: a rule matches no layer, or a scheme does not fit a layer.
        UnsupportedError: there is nothing to quantize, or it is quantized already.
    """
    config = as_config(scheme)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"expected a model (nn.Module), found a {type(model).__name__}; "
            "ptq.load_float gives one: model, tokenizer = ptq.load_float(...)"
        )
    _refuse_quantized(model)
    infos = read_layers(model)
    linears = [info for info in infos if info.is_linear]
    if not linears:
        raise UnsupportedError(
            f"{type(model).__name__} has no nn.Linear layer, so there is nothing to quantize"
        )
    if linears[0].name == "":
        raise UnsupportedError(
            f"the model is a single {linears[0].kind}, which has no place for another layer; "
            "wrap it: nn.Sequential(layer)"
        )
    _refuse_idle_rules(config.rules, infos, config)
    _refuse_without_embedding(config, infos)
    layers = tuple(_plan_layer(info, config, dtype) for info in infos)
    first_float = next((i.tensors[0].dtype for i in infos if i.tensors), torch.float32)
    made = Plan(layers, dtype or first_float)
    if not made.quantized:
        raise ConfigError(_why_nothing(made, {info.name for info in linears}))
    return made


def _why_nothing(made: Plan, linears: set[str]) -> str:
    """Every linear layer stays in float: which rules keep them, and what else the model is of."""
    reasons: dict[str, str] = {}
    others: dict[str, int] = defaultdict(int)
    for layer in made.layers:
        if layer.name in linears:
            reasons.setdefault(layer.decided_by, layer.name)
        elif layer.kind != "Embedding":
            others[layer.kind] += layer.parameters
    kept = "; ".join(f"{name} ({decided_by})" for decided_by, name in reasons.items())
    largest = max(others, key=lambda kind: others[kind], default=None)
    share = 0 if largest is None else others[largest] / max(1, made.parameters)
    text = f"every linear layer stays in float: {kept}; relax that"
    if share < 0.1:
        return text
    return f"{text}; {share:.0%} of the parameters are in {largest}, which ptq cannot quantize"


def _plan_layer(
    info: LayerInfo, config: QuantizationConfig, dtype: torch.dtype | None
) -> LayerPlan:
    scheme, reason, decided_by = _decide(info, config)
    before = sum(_tensor_bytes(tensor, dtype) for tensor in info.tensors)
    after = before
    shares = info.tied_to if info.is_linear and config.tied_embeddings == "keep" else None
    if scheme is not None:
        _check_fits(info, scheme, decided_by)
        if shares is None:
            after = quantized_bytes(info, scheme, dtype)
    return LayerPlan(
        info.name,
        info.kind,
        info.shape,
        info.parameters,
        scheme,
        reason,
        decided_by,
        before,
        after,
        info.is_embedding,
        shares if scheme is not None else None,
    )


def _decide(info: LayerInfo, config: QuantizationConfig) -> tuple[Scheme | None, str, str]:
    """Scheme, reason for float, and the rule that decided."""
    tied_head = info.is_linear and info.tied_to is not None and config.tied_embeddings == "keep"
    if config.embeddings is not None and (info.is_embedding or tied_head):
        return config.embeddings, "", f"embeddings: {config.embeddings}"
    if info.is_embedding:
        return None, "an embedding", "default: embeddings stay float"
    if info.obstacle is not None:
        return None, info.obstacle, "kind of module"
    if info.tied_to is not None and config.tied_embeddings == "keep":
        return None, f"its weight is tied to {info.tied_to}", "tied_embeddings: keep"
    scheme: Scheme | None = config.scheme
    decided_by, reason = f"scheme: {config.scheme}", ""
    if info.is_head:
        scheme, reason, decided_by = None, "output head", "default: the output head stays float"
    for number, rule in enumerate(config.rules):
        if matches(rule.layers, info.name):
            scheme, decided_by = rule.scheme, f"rules.{number}: {rule.layers}"
            reason = "as the rule says" if scheme is None else ""
    return scheme, reason, decided_by


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's pattern (a glob, or ``re:`` and a regular expression) names the layer."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _refuse_idle_rules(
    rules: Iterable[Rule], infos: list[LayerInfo], config: QuantizationConfig
) -> None:
    names = [info.name for info in infos if info.is_linear]
    for number, rule in enumerate(rules):
        hit = [name for name in names if matches(rule.layers, name)]
        tied = {i.name for i in infos if i.tied_to is not None}
        if not hit:
            raise ConfigError(
                f"rules.{number}: {rule.layers!r} matches no linear layer; "
                f"there are {_examples(names)}"
            )
        asks = rule.scheme is not None or config.embeddings is not None
        if asks and set(hit) <= tied and config.tied_embeddings == "keep":
            raise ConfigError(
                f"rules.{number}: {rule.layers!r} matches only {hit[0]}, whose weight is tied to "
                "the embedding; set tied_embeddings: untie to give it a copy of its own"
            )


def _refuse_without_embedding(config: QuantizationConfig, infos: list[LayerInfo]) -> None:
    """Whether the key ``embeddings`` has something to act on."""
    if config.embeddings is None:
        return
    if not any(info.is_embedding for info in infos):
        found = ", ".join(sorted({i.kind for i in infos if "mbedding" in i.kind}))
        raise ConfigError(
            f"embeddings: {config.embeddings}: the model has no plain nn.Embedding for its tokens"
            f"{found and f', only {found}'}; leave the key out"
        )


def _examples(names: list[str]) -> str:
    folded = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    return ", ".join(folded[:12]) + (", ..." if len(folded) > 12 else "")


def _check_fits(info: LayerInfo, scheme: Scheme, decided_by: str) -> None:
    try:
        scheme.weights.granularity_value.scale_shape((info.shape[0], info.shape[1]))
    except ConfigError as error:
        raise ConfigError(f"layer {info.name} {list(info.shape)} ({decided_by}): {error}") from None


def quantized_bytes(info: LayerInfo, scheme: Scheme, dtype: torch.dtype | None) -> int:
    """Bytes of a QuantLinear's tensors, as the checkpoint will hold them."""
    rows, columns = info.shape
    weights = scheme.weights
    scales = torch.Size(weights.granularity_value.scale_shape((rows, columns))).numel()
    per_scale = weights.torch_scale_dtype.itemsize + (0 if weights.symmetric else 1)
    total = rows * packed_width(columns, weights.number_format.bits) + scales * per_scale
    if scheme.activations is not None and scheme.activations.mode == "static":
        total += 4 if scheme.activations.symmetric else 8
    return total + sum(_tensor_bytes(t, dtype) for t in info.tensors if t.name != "weight")


def _tensor_bytes(tensor: TensorInfo, dtype: torch.dtype | None) -> int:
    """Bytes in the checkpoint: float parameters are cast, buffers keep their dtype."""
    stored = tensor.dtype
    if dtype is not None and tensor.is_parameter and tensor.dtype.is_floating_point:
        stored = torch.float32 if dtype in tensor.float32_in else dtype
    return torch.Size(tensor.shape).numel() * stored.itemsize


def _refuse_quantized(model: nn.Module) -> None:
    name = next(iter(quantized_modules(model)), None)
    if name is not None:
        raise UnsupportedError(
            f"layer {name} is already quantized by ptq; ptq.dequantize(model) first, "
            "or start from the float model"
        )
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, dict) else type(config).__name__
        raise UnsupportedError(
            f"the model is already quantized ({method}); start from the float one"
        )
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor or not (
            parameter.is_floating_point() or parameter.is_complex()
        ):
            raise UnsupportedError(
                f"parameter {name} is a {type(parameter.data).__name__} of {parameter.dtype}: "
                "the model is already quantized; start from the float one"
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def megabytes(count: int) -> str:
    """Bytes as text; four decimals for what is small."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e6:.4f} MB"
