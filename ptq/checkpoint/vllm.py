"""What vLLM does not load of what the formats can hold.

The limits are those of its sources (``compressed_tensors.py``, ``auto_gptq.py``, ``auto_awq.py``,
``marlin_utils.py``); its packed weights go to the Marlin kernels. It was not run here.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ptq.errors import UnsupportedError
from ptq.formats import INTEGERS
from ptq.model import Experts, output_head
from ptq.modules import QuantLinear

GROUP_SIZES = (32, 64, 128)
_ROWS, _COLUMNS = 64, 128  # what Marlin's tiles divide
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
"""Layers of one parent that vLLM makes one matrix of."""
_ONE_FOR_ALL = {
    "input_scale": "choose dynamic activations (w8a8)",
    "input_zero_point": "choose dynamic activations (w8a8)",
    "input_order": "quantize again without act-order",
}
"""What these layers must have in common, and what to do where they do not."""


@dataclass(frozen=True)
class Loads:
    """What vLLM loads of a format.

    Args:
        symmetric, asymmetric: bits of the weights where the inputs stay float.
        int8: whether the format has int8 inputs.
        tiles: whether sizes must be multiples of Marlin's tiles (there is no other kernel).
    """

    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    int8: bool
    tiles: bool


def check_vllm(model: nn.Module, layers: Mapping[str, QuantLinear], loads: Loads) -> None:
    """Whether vLLM loads these layers.

    Raises:
        UnsupportedError: it does not; the layer is named.
    """
    head = output_head(model)
    _check_experts(model, loads)
    for name, layer in layers.items():
        if layer is head:
            raise _vllm(
                name, "is the output head, which it keeps in float", "set its rule to float"
            )
        problem = _problem(layer, loads)
        if problem is not None:
            raise _vllm(name, *problem)
    fused = list(fused_layers(model))
    for names in fused:
        check_alike(model, names)
    together = {name for names in fused for name in names}
    for names in [*fused, *([name] for name in layers if name not in together)]:
        if loads.tiles:
            _check_rows(model, names, loads)


def _problem(layer: QuantLinear, loads: Loads) -> tuple[str, str] | None:
    """What vLLM does not load of a layer, and what to do."""
    if layer.scheme.weights.format not in INTEGERS:
        return _float8(layer)
    return _weight_only(layer, loads) if layer.scheme.activations is None else _int8(layer)


def _float8(layer: QuantLinear) -> tuple[str, str] | None:
    if layer.scheme.weights.granularity == "group":
        return f"is {layer.scheme}: it takes fp8 with a scale per channel or tensor", "choose fp8"
    return None


def _weight_only(layer: QuantLinear, loads: Loads) -> tuple[str, str] | None:
    weights = layer.scheme.weights
    bits, size = weights.int_format.bits, weights.group_size
    wanted = loads.symmetric if weights.symmetric else loads.asymmetric
    if bits not in wanted:
        kind = "symmetric" if weights.symmetric else "asymmetric"
        choices = [f"{' or '.join(map(str, wanted))} bits"] if wanted else ["symmetric weights"]
        choices += ["or int8 activations"] if loads.int8 else []
        return f"has {kind} weights of {bits} bits", f"choose {', '.join(choices)}"
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
    if loads.tiles and layer.in_features % _COLUMNS:
        return (
            f"has {layer.in_features} input channels, no multiple of {_COLUMNS}",
            _smaller(loads),
        )
    return None


def _smaller(loads: Loads) -> str:
    return "choose w8a8 for it, or leave it float" if loads.int8 else "leave it float"


def _int8(layer: QuantLinear) -> tuple[str, str] | None:
    weights = layer.scheme.weights
    if weights.int_format.bits != 8 or weights.granularity == "group" or not weights.symmetric:
        return (
            f"is {layer.scheme}: with int8 activations it takes symmetric int8 weights with a "
            "scale per channel or tensor",
            "choose w8a8, or float activations (a16)",
        )
    return None


def _check_experts(model: nn.Module, loads: Loads) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for leaf, layer in _linears(module):
                problem = _expert(layer, loads) if isinstance(layer, QuantLinear) else None
                if problem is not None:
                    raise _vllm(f"{name}.{leaf}", *problem)
            check_alike(model, [f"{name}.{leaf}" for leaf, _ in _linears(module)])
        own = module.parameters(recurse=False)
        if type(module).__name__.endswith("Experts") and any(p.dim() == 3 for p in own):
            raise _vllm(
                name,
                "keeps its experts in one float tensor, where it expects codes of each",
                "keep the ptq format",
            )


def _linears(experts: Experts) -> list[tuple[str, nn.Module]]:
    kinds = (nn.Linear, QuantLinear)
    return [(name, m) for name, m in experts.named_modules() if isinstance(m, kinds)]


def _expert(layer: QuantLinear, loads: Loads) -> tuple[str, str] | None:
    """What vLLM's kernels for experts do not take of what it loads elsewhere."""
    scheme, weights = layer.scheme, layer.scheme.weights
    integer = weights.format in INTEGERS
    if integer and scheme.activations is None:
        if weights.symmetric or not loads.int8:
            return None
        return "has asymmetric weights, which it does not take for experts", "choose symmetric ones"
    plain = scheme.activations is not None and scheme.activations.mode == "dynamic"
    if plain and weights.granularity == "channel":
        return None
    kind = "int8" if integer else "fp8"
    return (
        f"is {scheme}: for experts it takes {kind} inputs with a scale per token, and {kind} "
        "weights with a scale per channel",
        f"choose {'w8a8' if integer else 'fp8'}",
    )


def fused_layers(model: nn.Module) -> Iterator[list[str]]:
    """The names of linear layers that become one."""
    for name, parent in model.named_modules():
        prefix = f"{name}." if name else ""
        for leaves in _FUSED:
            found = [leaf for leaf in leaves if isinstance(getattr(parent, leaf, None), nn.Module)]
            if len(found) > 1:
                yield [prefix + leaf for leaf in found]


def check_alike(model: nn.Module, names: list[str]) -> None:
    """Whether these layers, which become one, have the same scheme and what goes with it.

    Raises:
        UnsupportedError: they do not; the first one is named.
    """
    kinds = defaultdict(list)
    for name in names:
        module = model.get_submodule(name)
        kinds[str(module.scheme) if isinstance(module, QuantLinear) else "float"].append(name)
    if len(kinds) > 1:
        said = ", ".join(f"{own[0]} is {kind}" for kind, own in kinds.items())
        raise _vllm(names[0], f"becomes one with its siblings, but {said}", "give them one scheme")
    for field, remedy in _ONE_FOR_ALL.items():
        values = [getattr(model.get_submodule(name), field, None) for name in names]
        given = [value for value in values if isinstance(value, torch.Tensor)]
        if any(not torch.equal(value, given[0]) for value in given):
            raise _vllm(
                names[0],
                f"becomes one with its siblings, whose {field} is another",
                remedy,
            )


def _check_rows(model: nn.Module, names: list[str], loads: Loads) -> None:
    """Whether the rows of the layers, which become one, fill Marlin's tiles."""
    modules = [model.get_submodule(name) for name in names]
    layers = [m for m in modules if isinstance(m, QuantLinear) and _is_packed(m)]
    rows = sum(layer.out_features for layer in layers)
    if rows % _ROWS:
        whose = " with its siblings" if len(names) > 1 else ""
        raise _vllm(
            names[0],
            f"has {rows} output channels{whose}, no multiple of {_ROWS}",
            _smaller(loads),
        )


def _is_packed(layer: QuantLinear) -> bool:
    return layer.scheme.activations is None and layer.scheme.weights.format in INTEGERS


def _vllm(name: str, problem: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        f"layer {name} {problem}: not loadable by vLLM; {remedy} "
        "(or write it for transformers alone: --engine transformers)"
    )
