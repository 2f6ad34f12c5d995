"""Putting quantized layers into a model, and taking them out again."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ptq.algorithms import round_to_nearest, with_static_input
from ptq.calibrate import LayerStatistics
from ptq.config import Scheme, WeightScheme
from ptq.core import QuantizedWeight
from ptq.errors import CalibrationError, PTQError, UnsupportedError
from ptq.model import (
    fold,
    forget_quantization,
    forget_ties,
    read_layers,
    replace_module,
    shared_modules,
    take_place,
)
from ptq.modules import QuantEmbedding, QuantLinear, quantized_modules, share_inputs, tie

Progress = Callable[[Iterable[str]], Iterable[str]]
Quantize = Callable[[Tensor, WeightScheme], QuantizedWeight]
See = Callable[[str, Tensor, QuantizedWeight], None]
"""Told about a layer's name, its float weight [N, K], and the codes for it."""


def quantize_layers(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    statistics: Mapping[str, LayerStatistics],
    quantize: Quantize,
    progress: Progress = iter,
    fill: Callable[[str], None] | None = None,
    placed: Callable[[str], None] | None = None,
    see: See | None = None,
) -> None:
    """Replace the named ``nn.Linear`` layers by :class:`QuantLinear`, in place, one at a time.

    A layer's float weight is freed as soon as its codes exist; its forward hooks stay.

    Args:
        quantize: makes the codes of a weight [N, K].
        fill: called with a layer's name right before its weight is read, to put it there.
        placed: called with a layer's name once its :class:`QuantLinear` is in place.
        see: called before that, while the float weight is there still.

    Raises:
        CalibrationError: a static scheme has no statistics.
    """
    tied = {i.name for i in read_layers(model) if i.tied_to is not None}
    shared = shared_modules(model)
    for name in progress(schemes):
        if fill is not None:
            fill(name)
        weight = _quantized(model, name, schemes[name], statistics, quantize)
        if see is not None:
            see(name, _weight_of(model, name), weight)
        place(model, name, weight, schemes[name], alone=name not in shared)
        if name in tied:
            forget_ties(model)
        if placed is not None:
            placed(name)
    share_inputs(model)


def _weight_of(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def quantize_embeddings(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    sharing: Mapping[str, str],
    see: See | None = None,
) -> None:
    """Replace the named ``nn.Embedding`` layers by :class:`QuantEmbedding`, in place.

    Args:
        sharing: output heads, each with the embedding whose weight it shares: they become
            :class:`QuantLinear` layers over the same codes.
        see: as in :func:`quantize_layers`.
    """
    for name, scheme in schemes.items():
        old = model.get_submodule(name)
        assert isinstance(old, nn.Embedding)
        try:
            weight = round_to_nearest(old.weight, scheme.weights)
        except PTQError as error:
            raise type(error)(f"layer {name}: {error}") from None
        if see is not None:
            see(name, old.weight.detach(), weight)
        new = QuantEmbedding(weight, scheme, old.weight.dtype, old.padding_idx)
        for head in (head for head, owner in sharing.items() if owner == name):
            linear = model.get_submodule(head)
            assert isinstance(linear, nn.Linear)
            bias = None if linear.bias is None else linear.bias.detach()
            layer = take_place(linear, QuantLinear(weight, scheme, bias))
            tie(new, layer)
            replace_module(model, head, layer)
        replace_module(model, name, take_place(old, new))


def place(
    model: nn.Module, name: str, weight: QuantizedWeight, scheme: Scheme, *, alone: bool = False
) -> None:
    """Put a :class:`QuantLinear` with this weight in place of the float layer called ``name``.

    Args:
        alone: as in :func:`~ptq.model.replace_module`.
    """
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    bias = None if linear.bias is None else linear.bias.detach()
    layer = take_place(linear, QuantLinear(weight, scheme, bias))
    replace_module(model, name, layer, alone=alone)


def _quantized(
    model: nn.Module,
    name: str,
    scheme: Scheme,
    statistics: Mapping[str, LayerStatistics],
    quantize: Quantize,
) -> QuantizedWeight:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    try:
        weight = quantize(linear.weight, scheme.weights)
    except PTQError as error:
        raise type(error)(f"layer {name}: {error}") from None
    if scheme.activations is not None and scheme.activations.mode == "static":
        if name not in statistics:
            raise CalibrationError(f"layer {name}: static activations need calibration data")
        seen = statistics[name]
        device = linear.weight.device
        weight = with_static_input(
            weight, scheme.activations, seen.low.to(device), seen.high.to(device)
        )
    return weight


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every :class:`QuantLinear` by an ``nn.Linear`` with the weights it stands for.

    In place, and embeddings likewise; a head that shares an embedding's codes shares its weight.
    What was a ``Conv1D`` or a module of fused experts becomes one again.
    The result is float and has the quantization error of the weights; activations are no longer
    quantized.

    Args:
        dtype: of the weights (default: that of the model's other parameters, else float32).

    Raises:
        UnsupportedError: the model is itself a quantized layer.
    """
    if isinstance(model, QuantLinear):
        raise UnsupportedError(
            "the model is a single QuantLinear, which has no place for another layer; "
            "wrap it: nn.Sequential(layer)"
        )
    layers = quantized_modules(model)
    wanted = dtype or next((p.dtype for p in model.parameters()), torch.float32)
    shared = shared_modules(model)
    tables = {m: _float_weight(m, wanted) for m in layers.values() if isinstance(m, QuantEmbedding)}
    for name, layer in layers.items():
        if isinstance(layer, QuantEmbedding):
            rows, columns = layer.num_embeddings, layer.embedding_dim
            new: nn.Module = nn.Embedding(rows, columns, layer.padding_idx, device="meta")
            new.weight = tables[layer]
        else:
            owner = layer.tied_to[0] if layer.tied_to else None
            weight = tables.get(owner) if isinstance(owner, QuantEmbedding) else None
            new = _float_linear(layer, weight, wanted)
        replace_module(model, name, new.train(layer.training), alone=name not in shared)
    fold(model)
    forget_quantization(model)
    return model


def _float_weight(layer: QuantLinear | QuantEmbedding, dtype: torch.dtype) -> nn.Parameter:
    made = (
        layer.float_weight(dtype)
        if isinstance(layer, QuantLinear)
        else layer.quantized_weight.dequantize(dtype)
    )
    return nn.Parameter(made, requires_grad=False)


def _float_linear(layer: QuantLinear, weight: nn.Parameter | None, dtype: torch.dtype) -> nn.Linear:
    """The layer in float, with this weight where it shares one."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = _float_weight(layer, dtype) if weight is None else weight
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return linear
