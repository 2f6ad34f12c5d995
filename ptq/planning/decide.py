"""Deciding the scheme of every layer, from the configuration and the shapes alone."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ptq.config import QuantizationConfig, Scheme, as_config
from ptq.errors import ConfigError, UnsupportedError
from ptq.model.layers import LayerInfo, read_layers
from ptq.planning.refuse import (
    refuse_idle_rules,
    refuse_quantized,
    refuse_unprepared,
    refuse_without_embedding,
)
from ptq.planning.rules import matches
from ptq.planning.sizes import quantized_bytes, tensor_bytes, untied_bytes
from ptq.planning.whole import LayerPlan, Plan
from ptq.recipe import Recipe, make_recipe


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
    refuse_quantized(model)
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
    refuse_idle_rules(config.rules, infos, config)
    refuse_without_embedding(config, infos)
    recipe = make_recipe(config.recipe, config.scheme)
    refuse_unprepared(model, config, recipe, infos)
    layers = tuple(_plan_layer(info, config, recipe, dtype) for info in infos)
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
    info: LayerInfo, config: QuantizationConfig, recipe: Recipe, dtype: torch.dtype | None
) -> LayerPlan:
    scheme, reason, decided_by = _decide(info, config)
    before = sum(tensor_bytes(tensor, dtype) for tensor in info.tensors)
    after = before
    shares = info.tied_to if info.is_linear and config.tied_embeddings == "keep" else None
    if scheme is not None and info.is_linear and shares is None:
        scheme = recipe.decided(scheme)
    if scheme is not None:
        _check_fits(info, scheme, decided_by)
        if shares is None:
            after = quantized_bytes(info, scheme, dtype)
    elif info.is_head and info.tied_to is not None and recipe.unties:
        after += untied_bytes(info, dtype)
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


def _check_fits(info: LayerInfo, scheme: Scheme, decided_by: str) -> None:
    try:
        scheme.weights.granularity_value.scale_shape((info.shape[0], info.shape[1]))
    except ConfigError as error:
        raise ConfigError(f"layer {info.name} {list(info.shape)} ({decided_by}): {error}") from None
