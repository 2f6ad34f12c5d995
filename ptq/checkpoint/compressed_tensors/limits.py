"""What the compressed-tensors format cannot hold."""

from collections.abc import Mapping

from torch import nn

from ptq.checkpoint.compressed_tensors.groups import layout_for
from ptq.config import Scheme
from ptq.errors import UnsupportedError
from ptq.model import Experts
from ptq.modules import QuantEmbedding, QuantLinear


def check_format(modules: Mapping[str, QuantLinear | QuantEmbedding]) -> dict[str, QuantLinear]:
    """The layers, if the format can hold each of them.

    Raises:
        UnsupportedError: it cannot; the layer is named.
    """
    layers = {}
    for name, module in modules.items():
        if isinstance(module, QuantEmbedding):
            raise _refusal(
                name,
                "is a quantized embedding, which compressed-tensors cannot hold here",
                "quantize again with embeddings: float",
            )
        if module.tied_to:
            raise _refusal(
                name, "shares an embedding's codes", "quantize again with embeddings: float"
            )
        scheme, weights = module.scheme, module.scheme.weights
        if scheme.input_rotation is not None:
            raise _refusal(
                name,
                "rotates its input as it runs, which no reader of compressed-tensors would do",
                "leave the step 'rotation' out of the recipe",
            )
        if scheme.input_order:
            raise _refusal(
                name,
                "has groups of inputs that are not neighbours (act-order), which the format "
                "no longer has",
                "choose --format gptq or gptq-v2",
            )
        packed = layout_for(scheme) == "pack-quantized"
        if packed and weights.granularity == "tensor" and not weights.symmetric:
            raise _refusal(
                name,
                "has one zero point for the whole weight, which packed codes cannot have",
                "choose per-channel scales, or symmetric weights",
            )
        layers[name] = module
    return layers


def _refusal(name: str, problem: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(f"layer {name} {problem}; {remedy}")


def check_transformers(model: nn.Module, layers: Mapping[str, QuantLinear]) -> None:
    """Whether transformers loads what is part of fused experts, which it dequantizes for that.

    Raises:
        UnsupportedError: it does not; the layer is named.
    """
    owners = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    prefixes = tuple(f"{owner}." for owner in owners)
    schemes: dict[bool, Scheme] = {}
    for name, layer in layers.items():
        expert, scheme = name.startswith(prefixes), layer.scheme
        if expert and (layout_for(scheme) == "int-quantized" or not scheme.weights.symmetric):
            raise _refusal(
                name,
                f"is {scheme} and part of fused experts, which transformers loads with packed "
                "symmetric or fp8 weights only",
                "choose a symmetric a16 scheme or fp8 for the experts, or --engine vllm",
            )
        first = schemes.setdefault(expert, scheme)
        if prefixes and first != scheme:
            raise _refusal(
                name,
                f"is {scheme}, others are {first}, and transformers loads one scheme for experts "
                "and one for all other layers",
                "give them one scheme, or choose --engine vllm",
            )
