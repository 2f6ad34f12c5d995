"""The quantized layers of a model, and which of them share their input."""

from collections import defaultdict
from typing import Any

from torch import nn

from ptq.errors import UnsupportedError
from ptq.modules.quant_embedding import QuantEmbedding
from ptq.modules.quant_linear import QuantLinear
from ptq.modules.shared_input import SharedInput


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers, by name.

    Raises:
        UnsupportedError: there is none.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    if not layers:
        raise UnsupportedError("the model has no quantized layer; ptq.quantize(model, ...) first")
    return layers


def quantized_modules(model: nn.Module) -> dict[str, QuantLinear | QuantEmbedding]:
    """The quantized layers and embeddings, by name; there may be none."""
    kinds = QuantLinear | QuantEmbedding
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def share_inputs(model: nn.Module) -> None:
    """Let quantized layers of one parent module that quantize alike quantize (and rotate) their
    input once.

    Not with static activations or an order of the inputs, which each layer has of its own.
    """
    for parent in model.modules():
        alike: dict[Any, list[QuantLinear]] = defaultdict(list)
        for child in parent.children():
            if isinstance(child, QuantLinear) and not child.scheme.input_order:
                activations, rotation = child.scheme.activations, child.scheme.input_rotation
                dynamic = activations is not None and activations.mode == "dynamic"
                if dynamic or (activations is None and rotation is not None):
                    alike[child.in_features, activations, rotation].append(child)
        for layers in alike.values():
            shared = SharedInput(len(layers)) if len(layers) > 1 else None
            for layer in layers:
                layer.shared_input = shared
