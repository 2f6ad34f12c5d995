"""Transforms: the float weights of a block rewritten so that they, and the inputs of its layers,
are easier to quantize, while the float block computes what it did."""

from ptq.transforms.apply import apply_scale
from ptq.transforms.awq import AWQOptions, awq
from ptq.transforms.base import ChannelStats, Preparation, Prepared, ScaleGroup, Transform
from ptq.transforms.equalize import EqualizeOptions, equalize
from ptq.transforms.groups import find_groups
from ptq.transforms.residual import ResidualRotationOptions, require_stream, rotate_residual
from ptq.transforms.rotation import RotationOptions, rotate
from ptq.transforms.smoothquant import SmoothQuantOptions, smoothquant

PREPARATIONS: dict[str, Preparation] = {
    "residual_rotation": Preparation(
        require_stream, rotate_residual, ResidualRotationOptions, unties=True
    ),
}
"""Of the whole model, by the name in a recipe."""

TRANSFORMS: dict[str, Transform] = {
    "smoothquant": Transform(smoothquant, SmoothQuantOptions),
    "awq": Transform(awq, AWQOptions),
    "equalize": Transform(equalize, EqualizeOptions),
    "rotation": Transform(rotate, RotationOptions),
}
"""Of a block, by the name in a recipe."""

__all__ = [
    "PREPARATIONS",
    "TRANSFORMS",
    "ChannelStats",
    "Preparation",
    "Prepared",
    "ScaleGroup",
    "Transform",
    "apply_scale",
    "find_groups",
]
