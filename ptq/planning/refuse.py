"""What cannot be planned: a model that is quantized already, rules that name no layer."""

import re
from collections.abc import Iterable

import torch
from torch import nn

from ptq.config import QuantizationConfig, Rule
from ptq.errors import ConfigError, UnsupportedError
from ptq.model.layers import LayerInfo
from ptq.modules import quantized_modules
from ptq.planning.rules import matches
from ptq.planning.sizes import megabytes, untied_bytes
from ptq.recipe import Recipe


def refuse_quantized(model: nn.Module) -> None:
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


def refuse_idle_rules(
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


def refuse_without_embedding(config: QuantizationConfig, infos: list[LayerInfo]) -> None:
    """Whether the key ``embeddings`` has something to act on."""
    if config.embeddings is None:
        return
    if not any(info.is_embedding for info in infos):
        found = ", ".join(sorted({i.kind for i in infos if "mbedding" in i.kind}))
        raise ConfigError(
            f"embeddings: {config.embeddings}: the model has no plain nn.Embedding for its tokens"
            f"{found and f', only {found}'}; leave the key out"
        )


def refuse_unprepared(
    model: nn.Module, config: QuantizationConfig, recipe: Recipe, infos: list[LayerInfo]
) -> None:
    """Whether the structure of the model allows what the recipe does to the whole of it."""
    for step, _ in recipe.preparations:
        step.require(model)
    tied = next((info for info in infos if info.is_head and info.tied_to is not None), None)
    if recipe.unties and tied is not None and config.tied_embeddings == "keep":
        more = megabytes(untied_bytes(tied, None))
        raise ConfigError(
            f"recipe [{recipe}]: {recipe.names[0]} gives {tied.name} a weight of its own, and "
            f"it is tied to {tied.tied_to}; set tied_embeddings: untie ({more} more in "
            f"{tied.dtype}), or leave the step out"
        )


def _examples(names: list[str]) -> str:
    folded = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    return ", ".join(folded[:12]) + (", ..." if len(folded) > 12 else "")
