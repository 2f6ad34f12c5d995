"""What the compressed-tensors format cannot hold."""

from collections.abc import Mapping

from ptq.checkpoint.compressed_tensors.groups import layout_for
from ptq.errors import UnsupportedError
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
