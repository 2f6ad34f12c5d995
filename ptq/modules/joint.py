"""Layers that read one tensor become one product in a compiled graph: q, k and v; gate and up.

A product of one row costs as much in its call as in its weights when the layers are small. Each of
the layers asks for the product with all of their weights and takes its own columns; the compiler
sees the same product two or three times and computes it once.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ptq.core import QuantizedWeight
from ptq.kernels import LinearSpec, select
from ptq.modules.joint_product import JointProduct
from ptq.modules.quant_linear import QuantLinear


def readers_of_one_tensor(
    model: nn.Module, run: Callable[[], object]
) -> list[tuple[QuantLinear, ...]]:
    """Layers that were given the same tensor, unchanged in between, while the model ran."""
    seen: dict[tuple[int, int], list[QuantLinear]] = defaultdict(list)
    alive = []  # so that no other tensor gets the same identity

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantLinear)
        alive.append(inputs[0])
        seen[id(inputs[0]), inputs[0]._version].append(layer)

    hooks = [
        m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, QuantLinear)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(dict.fromkeys(layers)) for layers in seen.values() if len(set(layers)) > 1]


def join(layers: tuple[QuantLinear, ...], rows: int, dtype: torch.dtype) -> bool:
    """Let the layers be one product of so many rows in compiled graphs, if they quantize alike and
    one kernel serves each of them and all together. Their codes become parts of one tensor."""
    scheme = layers[0].scheme
    if any(layer.scheme != scheme or layer.tied_to for layer in layers):
        return False
    static = scheme.activations is not None and scheme.activations.mode == "static"
    if static or scheme.input_order or layers[0].quantized_weight.granularity.kind == "tensor":
        return False
    device = layers[0].codes.device.type
    kernels = {select(layer.spec(device, dtype, rows)) for layer in layers}
    weight = _below_one_another(layers)
    kernels.add(select(LinearSpec.of(weight, scheme.activations, device, dtype, rows)))
    if len(kernels) > 1:
        return False
    kernel = kernels.pop()
    _become_parts(layers, weight)
    prepared = kernel.prepare(weight, dtype)
    start = 0
    for layer in layers:
        columns = slice(start, start + layer.out_features)
        layer.joint = JointProduct(kernel, prepared, columns, rows, dtype)
        start = columns.stop
    return True


def _below_one_another(layers: tuple[QuantLinear, ...]) -> QuantizedWeight:
    weights = [layer.quantized_weight for layer in layers]
    first = weights[0]
    zero_points = [w.zero_point for w in weights if w.zero_point is not None]
    return QuantizedWeight(
        torch.cat([w.packed for w in weights]),
        torch.cat([w.scale for w in weights]),
        torch.cat(zero_points) if zero_points else None,
        first.format,
        first.granularity,
        (sum(w.shape[0] for w in weights), first.shape[1]),
    )


def _become_parts(layers: tuple[QuantLinear, ...], weight: QuantizedWeight) -> None:
    """Kernels read the codes where they are: so that there is no second copy of them."""
    parts = torch.split(weight.packed, [layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.release()
        layer.codes = part
