"""Damage done by hand to one layer of a quantized model, as it happens in practice."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptq.core import QuantizedWeight, quantize
from ptq.modules import QuantLinear

Damage = Callable[[QuantLinear], None]


@dataclass(frozen=True)
class Planted:
    """One damage.

    Args:
        layer: the end of its name in its block.
        scheme: of the model.
        damage: to the quantized layer, in place.
        causes: any of which names it.
        own_scheme: of the layer, where that is the damage.
    """

    name: str
    layer: str
    scheme: str | dict[str, Any]
    causes: tuple[str, ...]
    damage: Damage | None = None
    own_scheme: str | None = None


def set_weight(layer: QuantLinear, **changes: Any) -> None:
    """Give the layer another weight in place."""
    made = replace(layer.quantized_weight, **changes)
    for name in ("codes", "scale", "zero_point", "input_scale", "input_zero_point"):
        value = made.packed if name == "codes" else getattr(made, name)
        layer._buffers[name] = value
    layer.release()


def scaled(factor: float) -> Damage:
    return lambda layer: set_weight(layer, scale=layer.scale * factor)


def scaled_row(layer: QuantLinear) -> None:
    """A channel with a wrong scale."""
    scale = layer.scale.clone()
    scale[3] *= 8
    set_weight(layer, scale=scale)


def moved_zero_points(layer: QuantLinear) -> None:
    assert layer.zero_point is not None
    set_weight(layer, zero_point=(layer.zero_point + 2).clamp(-8, 7))


def recoded(layer: QuantLinear, change: Callable[[Tensor], Tensor]) -> None:
    weight = layer.quantized_weight
    made = QuantizedWeight.from_codes(
        change(weight.codes).contiguous(),
        weight.scale,
        weight.zero_point,
        weight.format,
        weight.granularity,
    )
    set_weight(layer, packed=made.packed)


def permuted_groups(layer: QuantLinear) -> None:
    """The groups of each row in another order, without their scales."""
    size = layer.scheme.weights.group_size
    recoded(layer, lambda codes: codes.roll(size, dims=1))


def swapped_nibbles(layer: QuantLinear) -> None:
    recoded(layer, lambda codes: codes.unflatten(1, (-1, 2)).flip(2).flatten(1))


def clipped(layer: QuantLinear) -> None:
    """Codes for a third of the range."""
    w = layer.scheme.weights
    scale = layer.scale / 3
    codes = quantize(
        layer.quantized_weight.dequantize(), scale, None, w.number_format, w.granularity_value
    )
    set_weight(layer, scale=scale)
    recoded(layer, lambda _: codes)


def narrower_input(layer: QuantLinear) -> None:
    assert layer.input_scale is not None
    set_weight(layer, input_scale=layer.input_scale / 16)


def wider_input(layer: QuantLinear) -> None:
    assert layer.input_scale is not None
    set_weight(layer, input_scale=layer.input_scale * 40)


@torch.no_grad()
def inject_outlier(model: nn.Module, block: str) -> None:
    """A channel between up_proj and down_proj grows a hundredfold; the block gives the same."""
    up = model.get_submodule(f"{block}.mlp.up_proj")
    down = model.get_submodule(f"{block}.mlp.down_proj")
    assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    up.weight[5] *= 300
    down.weight[:, 5] /= 300


@torch.no_grad()
def inject_behind_norm(model: nn.Module, block: str) -> None:
    """The same between a norm and what reads it."""
    module = model.get_submodule(block)
    module.post_attention_layernorm.weight[5] *= 300  # type: ignore[union-attr, index, operator]
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight[:, 5] /= 300


PLANTED = (
    Planted("all scales 1.5 times", "self_attn.q_proj", "w8a16", ("scale",), scaled(1.5)),
    Planted("negative scales", "mlp.gate_proj", "w8a8", ("scale",), scaled(-1)),
    Planted("one channel's scale", "self_attn.o_proj", "w8a8", ("scale",), scaled_row),
    Planted("zero points", "mlp.up_proj", "w4a16-g16-asym", ("zero_point",), moved_zero_points),
    Planted("groups permuted", "mlp.down_proj", "w4a16-g16", ("codes",), permuted_groups),
    Planted("nibbles swapped", "self_attn.k_proj", "w4a16-g16-asym", ("codes",), swapped_nibbles),
    Planted("weights clipped", "self_attn.v_proj", "w8a16", ("weight_clipping",), clipped),
    Planted("too few bits", "mlp.gate_proj", "w8a8", ("weight_rounding",), own_scheme="w2a8"),
    Planted(
        "static range too small", "mlp.up_proj", "w8a8-static", ("input_clipping",), narrower_input
    ),
    Planted(
        "static range too wide", "self_attn.v_proj", "w8a8-static", ("input_range",), wider_input
    ),
    Planted("outlier channel", "mlp.down_proj", "w8a8", ("outlier_channels",)),
)
