"""What the format cannot hold, and what vLLM does not load of what it can.

vLLM's limits are those of its sources (``compressed_tensors.py``, ``marlin_utils.py``); its packed
weights go to the Marlin kernels. It was not run here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from ptq.checkpoint.compressed_tensors.groups import layout_for
from ptq.errors import UnsupportedError
from ptq.formats import IntFormat
from ptq.model import Experts, stands_for
from ptq.modules import QuantEmbedding, QuantLinear

GROUP_SIZES = (32, 64, 128)
_ROWS, _COLUMNS = 64, 128  # what Marlin's tiles divide
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
"""Layers of one parent that vLLM makes one matrix of."""


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
        if not isinstance(weights.number_format, IntFormat):
            raise _refusal(
                name,
                f"has {weights.format} weights, which are not written to compressed-tensors",
                "keep the ptq format, or choose an integer scheme such as w8a8",
            )
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


def check_kinds(model: nn.Module, layers: Iterable[str]) -> None:
    """Whether each of these quantized layers was an ``nn.Linear``.

    Raises:
        UnsupportedError: it was not; the layer is named.
    """
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    for name in layers:
        origin = stands_for(model.get_submodule(name))
        if origin is not None:
            kind = type(origin).__name__
        elif any(name.startswith(f"{owner}.") for owner in experts):
            kind = "part of fused experts"
        else:
            continue
        raise _refusal(
            name,
            f"is {kind} in the float model, which no reader of compressed-tensors expects",
            "save it with ptq.save, or leave it float",
        )


def check_vllm(model: nn.Module, layers: Mapping[str, QuantLinear]) -> None:
    """Whether vLLM loads these layers.

    Raises:
        UnsupportedError: it does not; the layer is named.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in layers.items():
        if layer is head:
            raise _vllm(
                name, "is the output head, which it keeps in float", "set its rule to float"
            )
        problem = _weight_only(layer) if layer.scheme.activations is None else _int8(layer)
        if problem is not None:
            raise _vllm(name, *problem)
    _check_experts(model)
    fused = list(_fused(model))
    for names in fused:
        _check_alike(model, names)
    together = {name for names in fused for name in names}
    for names in [*fused, *([name] for name in layers if name not in together)]:
        _check_rows(model, names)


def _weight_only(layer: QuantLinear) -> tuple[str, str] | None:
    weights = layer.scheme.weights
    bits, size = weights.int_format.bits, weights.group_size
    wanted = (4, 8) if weights.symmetric else (4,)
    if bits not in wanted:
        kind = "symmetric" if weights.symmetric else "asymmetric"
        allowed = " or ".join(map(str, wanted))
        return f"has {kind} weights of {bits} bits", f"choose {allowed} bits, or int8 activations"
    if weights.granularity == "tensor":
        return "has one scale for the whole weight", "choose per-channel scales or groups"
    if size is not None and size not in GROUP_SIZES:
        fitting = [str(g) for g in GROUP_SIZES if layer.in_features % g == 0]
        return f"has group size {size}", f"choose {', '.join([*fitting, 'or per-channel scales'])}"
    if not weights.symmetric and layer.out_features % (32 // bits):
        return (
            f"has zero points for {layer.out_features} channels, which do not fill 32-bit words",
            "choose symmetric weights",
        )
    if layer.in_features % _COLUMNS:
        return (
            f"has {layer.in_features} input channels, no multiple of {_COLUMNS}",
            "choose w8a8 for it, or leave it float",
        )
    return None


def _int8(layer: QuantLinear) -> tuple[str, str] | None:
    weights = layer.scheme.weights
    if weights.int_format.bits != 8 or weights.granularity == "group" or not weights.symmetric:
        return (
            f"is {layer.scheme}: with int8 activations it takes symmetric int8 weights with a "
            "scale per channel or tensor",
            "choose w8a8, or float activations (a16)",
        )
    return None


def _check_experts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = module.parameters(recurse=False)
        if type(module).__name__.endswith("Experts") and any(p.dim() == 3 for p in own):
            raise _vllm(
                name,
                "keeps its experts in one float tensor, where it expects codes of each",
                "there is none yet for mixtures of experts",
            )


def _fused(model: nn.Module) -> Iterator[list[str]]:
    """The names of linear layers that become one."""
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        for leaves in _FUSED:
            found = [leaf for leaf in leaves if isinstance(getattr(parent, leaf, None), nn.Module)]
            if len(found) > 1:
                yield [prefix + leaf for leaf in found]


def _check_alike(model: nn.Module, names: list[str]) -> None:
    kinds = defaultdict(list)
    for name in names:
        module = model.get_submodule(name)
        kinds[str(module.scheme) if isinstance(module, QuantLinear) else "float"].append(name)
    if len(kinds) > 1:
        said = ", ".join(f"{own[0]} is {kind}" for kind, own in kinds.items())
        raise _vllm(names[0], f"becomes one with its siblings, but {said}", "give them one scheme")
    for field in ("input_scale", "input_zero_point"):
        values = [getattr(model.get_submodule(name), field, None) for name in names]
        given = [value for value in values if isinstance(value, torch.Tensor)]
        if any(not torch.equal(value, given[0]) for value in given):
            raise _vllm(
                names[0],
                f"becomes one with its siblings, whose {field} is another",
                "choose dynamic activations (w8a8)",
            )


def _check_rows(model: nn.Module, names: list[str]) -> None:
    """Whether the rows of the layers, which become one, fill Marlin's tiles."""
    modules = [model.get_submodule(name) for name in names]
    layers = [m for m in modules if isinstance(m, QuantLinear) and m.scheme.activations is None]
    rows = sum(layer.out_features for layer in layers)
    if rows % _ROWS:
        whose = " with its siblings" if len(names) > 1 else ""
        raise _vllm(
            names[0],
            f"has {rows} output channels{whose}, no multiple of {_ROWS}",
            "choose w8a8 for it, or leave it float",
        )


def _vllm(name: str, problem: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        f"layer {name} {problem}: not loadable by vLLM; {remedy} "
        "(or write it for transformers alone: --engine transformers)"
    )


def _refusal(name: str, problem: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(f"layer {name} {problem}; {remedy}")
