"""What GPTQ and AWQ cannot hold, and what transformers does not load of it."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from ptq.checkpoint.foreign_names import all_names, kept_float
from ptq.checkpoint.packed_int32.layouts import fills_words
from ptq.checkpoint.packed_int32.settings import BITS, LayoutName
from ptq.checkpoint.vllm import Loads
from ptq.errors import UnsupportedError
from ptq.formats import INTEGERS
from ptq.model import Experts, FileNames, output_head
from ptq.modules import QuantEmbedding, QuantLinear

VLLM = {
    "gptq": Loads(symmetric=(4, 8), asymmetric=(), int8=False, tiles=True),
    "awq": Loads(symmetric=(4,), asymmetric=(4,), int8=False, tiles=False),
}
"""What vLLM loads of each method; AWQ has kernels of its own for what Marlin does not take."""
_GROUP_SIZES = {"gptq": (16, 32, 64, 128, 256, 512, 1024), "awq": (16, 32, 64, 128)}
"""Those of GPTQModel's kernels, by which transformers runs both formats."""


def method_of_layout(layout: LayoutName) -> str:
    """``quant_method`` of a layout."""
    return "awq" if layout == "awq" else "gptq"


def check_format(
    modules: Mapping[str, QuantLinear | QuantEmbedding], layout: LayoutName
) -> dict[str, QuantLinear]:
    """The layers, if the format can hold each of them.

    Raises:
        UnsupportedError: it cannot; the layer is named.
    """
    layers = {}
    for name, module in modules.items():
        if isinstance(module, QuantEmbedding) or module.tied_to:
            raise _refusal(
                name,
                f"is a quantized embedding or shares one's codes, which {layout} cannot hold",
                "quantize again with embeddings: float",
            )
        problem = _scheme_problem(module, layout) or _size_problem(module, layout)
        if problem is not None:
            raise _refusal(name, *problem)
        layers[name] = module
    _check_alike(layers, layout)
    return layers


def _scheme_problem(layer: QuantLinear, layout: LayoutName) -> tuple[str, str] | None:
    scheme, weights = layer.scheme, layer.scheme.weights
    if weights.format not in INTEGERS:
        return (
            f"has {weights.format} weights, which {layout} does not have",
            "choose --format compressed-tensors, or an integer scheme such as w4a16-g64",
        )
    if scheme.activations is not None:
        return (
            f"is {scheme}, whose inputs are int8, which {layout} has no place for",
            "choose float inputs (a16), or --format compressed-tensors",
        )
    if scheme.input_rotation is not None:
        return (
            f"rotates its input as it runs, which no reader of {layout} would do",
            "leave the step 'rotation' out of the recipe",
        )
    if scheme.input_order and layout == "awq":
        return (
            "has groups of inputs that are not neighbours (act-order), which awq has no place for",
            "choose --format gptq or gptq-v2",
        )
    bits = weights.int_format.bits
    if bits not in BITS[layout]:
        choices = " or ".join(map(str, BITS[layout]))
        return (
            f"has {bits} bits, {layout} has {choices}",
            f"choose {choices} bits, or --format compressed-tensors",
        )
    if weights.granularity == "tensor":
        return "has one scale for the whole weight", "choose per-channel scales or groups"
    sizes = _GROUP_SIZES[method_of_layout(layout)]
    if weights.group_size is not None and weights.group_size not in sizes:
        fitting = [str(g) for g in sizes if layer.in_features % g == 0]
        return (
            f"has group size {weights.group_size}, for which GPTQModel has no kernel",
            f"choose {', '.join([*fitting, 'or per-channel scales'])}",
        )
    return None


def _size_problem(layer: QuantLinear, layout: LayoutName) -> tuple[str, str] | None:
    bits = layer.scheme.weights.int_format.bits
    multiple = next(n for n in (4, 8, 16, 32) if fills_words(n, bits))
    sizes = {"output": layer.out_features, "input": layer.in_features}
    for kind, size in sizes.items():
        if size % multiple and (kind == "output" or layout != "awq"):
            return f"has {size} {kind} channels, no multiple of {multiple}", "leave it float"
    zero_point, lowest = layer.zero_point, layer.scheme.weights.int_format.qmin
    if layout == "gptq" and zero_point is not None and bool((zero_point == lowest).any()):
        return "has a zero point 0, which version 1 cannot hold", "choose --format gptq-v2"
    return None


def _check_alike(layers: Mapping[str, QuantLinear], layout: LayoutName) -> None:
    """Both formats as transformers loads them have one bit width and one group size."""
    kinds: dict[tuple[int, int | None], str] = {}
    for name, layer in layers.items():
        weights = layer.scheme.weights
        kinds.setdefault((weights.int_format.bits, weights.group_size), name)
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise _refusal(
            second,
            f"is {layers[second].scheme}, {first} is {layers[first].scheme}, and {layout} has one "
            "bit width and group size for all layers",
            "give them one scheme, or choose --format compressed-tensors",
        )


def check_model(
    model: PreTrainedModel, layers: Mapping[str, QuantLinear], layout: LayoutName
) -> None:
    """Whether transformers finds these layers, and no others, when it loads the format.

    Raises:
        UnsupportedError: it does not; the layer is named.
    """
    head = output_head(model)
    for name, layer in layers.items():
        if layer is head:
            raise _refusal(
                name,
                f"is the output head, which transformers keeps in float when it loads {layout}",
                "set its rule to float",
            )
    if layout == "awq":
        _check_names(model, layers)
    else:
        block_list(model, layers)


def check_transformers(model: nn.Module, layers: Mapping[str, QuantLinear], layout: str) -> None:
    """Whether none of these layers is part of fused experts, which transformers would leave random.

    Raises:
        UnsupportedError: one is; it is named.
    """
    owners = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    for name in layers:
        if name.startswith(tuple(f"{owner}." for owner in owners)):
            raise _refusal(
                name,
                f"is part of fused experts, which transformers does not load from {layout}",
                "choose --engine vllm, or --format compressed-tensors",
            )


def _check_names(model: nn.Module, layers: Mapping[str, QuantLinear]) -> None:
    """AutoAWQ and vLLM keep every layer in float whose name contains that of a float one."""
    names = FileNames(model)
    called = {other: name for name in layers for other in all_names(names, name)}
    for kept in kept_float(model):
        for other, name in called.items():
            if kept in other:
                raise _refusal(
                    name,
                    f"has a name that contains {kept}, which is float, and readers of awq would "
                    "take it for float as well",
                    f"quantize {kept}, or choose --format compressed-tensors",
                )


def block_list(model: nn.Module, layers: Mapping[str, QuantLinear]) -> str:
    """The name of the one list of blocks that all layers are in.

    Raises:
        UnsupportedError: they are not, and transformers quantizes one such list; a layer is named.
    """
    lists: list[str] = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    first = next(iter(layers))
    found = next((name for name in lists if first.startswith(f"{name}.")), None)
    for name in layers:
        if found is None or not name.startswith(f"{found}."):
            raise _refusal(
                name,
                f"is not in {found or 'a list of blocks'}, and transformers looks in one list of "
                "blocks when it loads gptq",
                "leave it float, or choose --format compressed-tensors",
            )
    assert found is not None
    return found


def _refusal(name: str, problem: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(f"layer {name} {problem}; {remedy}")
