"""Putting quantized layers into a model, and taking them out again."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ptq.algorithms import ALGORITHMS, with_static_input
from ptq.calibrate import LayerStatistics
from ptq.config import Scheme
from ptq.errors import CalibrationError, PTQError, UnsupportedError
from ptq.model import read_layers, replace_module
from ptq.modules import QuantLinear, share_inputs

Progress = Callable[[Iterable[str]], Iterable[str]]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def quantize_layers(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    statistics: Mapping[str, LayerStatistics],
    progress: Progress = iter,
) -> None:
    """Replace the named ``nn.Linear`` layers by :class:`QuantLinear`, in place, one at a time.

    A layer's float weight is freed as soon as its codes exist; its forward hooks stay.

    Raises:
        CalibrationError: a static scheme has no statistics.
    """
    tied = {i.name for i in read_layers(model) if i.tied_to is not None}
    for name in progress(schemes):
        replace_module(model, name, _quantized(model, name, schemes[name], statistics))
        if name in tied:
            _untie(model)
    share_inputs(model)


def _quantized(
    model: nn.Module, name: str, scheme: Scheme, statistics: Mapping[str, LayerStatistics]
) -> QuantLinear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    try:
        weight = ALGORITHMS["rtn"](linear.weight, scheme.weights)
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
    bias = None if linear.bias is None else linear.bias.detach()
    layer = QuantLinear(weight, scheme, bias).train(linear.training)
    for hooks in _HOOKS:
        setattr(layer, hooks, getattr(linear, hooks))
    return layer


def _untie(model: nn.Module) -> None:
    """Tell transformers that this weight is no longer tied, so that loading does not tie it."""
    if isinstance(model, PreTrainedModel):
        model.config.tie_word_embeddings = False
        model._tied_weights_keys = {}
        model.all_tied_weights_keys.clear()


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every :class:`QuantLinear` by an ``nn.Linear`` with the weights it stands for.

    In place. The result is float and has the quantization error of the weights; activations are
    no longer quantized.

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
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    wanted = dtype or next((p.dtype for p in model.parameters()), torch.float32)
    for name, layer in layers.items():
        linear = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(layer.quantized_weight.dequantize(wanted), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().to(wanted), requires_grad=False)
        replace_module(model, name, linear.train(layer.training))
    return model
