"""Reading a checkpoint in the compressed-tensors format, whoever wrote it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ptq.checkpoint.compressed_tensors.groups import (
    Group,
    Groups,
    Layout,
    group_of,
    layout_of,
    parse_groups,
    scheme_of,
)
from ptq.checkpoint.compressed_tensors.layer import expected_tensors, read_weight
from ptq.checkpoint.foreign import quantization_of
from ptq.checkpoint.foreign_files import ForeignFiles, foreign_files
from ptq.checkpoint.foreign_read import ForeignLayer, empty_model, filled, plain_linear
from ptq.checkpoint.manifest import CONFIG
from ptq.checkpoint.native_read import usable_device
from ptq.checkpoint.shard import dtype_name
from ptq.config import Scheme
from ptq.core import QuantizedWeight
from ptq.errors import CheckpointError, PTQError, UnsupportedError
from ptq.model import Experts


def read(
    directory: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """The model of a compressed-tensors directory, with QuantLinear layers, in eval mode.

    Codes, scales and zero points are those of the files, bit for bit. The format has no hashes:
    names, shapes, dtypes and the range of the codes are checked, not the bytes.

    Args:
        model: the float model, for what transformers cannot build from config.json. It becomes the
            quantized one.

    Raises:
        CheckpointError: a file or tensor is missing, left over, damaged or of another shape or
            dtype; it is named.
        UnsupportedError: a scheme or layout that ptq does not have; the layer is named.
    """
    root = Path(directory).expanduser()
    device = usable_device(device)
    groups = parse_groups(quantization_of(root), root / CONFIG)
    if model is None:
        model = empty_model(root)
    with foreign_files(root, model) as files:
        layers = {
            name: _layer(name, module, group, layout_of(group, groups, name), files)
            for name, module in model.named_modules()
            if not isinstance(module, Experts)
            and (group := _group(groups, name, module, files)) is not None
        }
        if not layers:
            raise CheckpointError(f"{root / CONFIG} has no group for any layer of the model")
        return filled(files, model, layers, device)


def _group(groups: Groups, name: str, module: nn.Module, files: ForeignFiles) -> Group | None:
    """The group of a layer, which is that of each of its parts."""
    parts = files.parts_of(name)
    found = [group_of(groups, files.called(part), module) for part in parts]
    if any(group != found[0] for group in found):
        raise UnsupportedError(
            f"layers {' and '.join(parts)} are one layer, {name}, in the model that transformers "
            "builds, but config.json has different schemes for them, which ptq cannot load; "
            "quantize again with one scheme for them"
        )
    return found[0]


def _layer(
    name: str, module: nn.Module, group: Group, layout: Layout, files: ForeignFiles
) -> ForeignLayer:
    linear = plain_linear(name, module)
    scheme_of(group, name, "float32", False)  # is there one?
    shape = linear.out_features // len(files.parts_of(name)), linear.in_features
    try:
        expected = expected_tensors(group, layout, *shape)
    except PTQError as error:
        raise type(error)(f"layer {name}: {error}") from None
    return ForeignLayer(linear, expected, partial(_made, name, group, layout, shape))


def _made(
    name: str, group: Group, layout: Layout, shape: tuple[int, int], tensors: Mapping[str, Tensor]
) -> tuple[QuantizedWeight, Scheme]:
    scale = tensors["weight_scale"]
    scheme = scheme_of(group, name, dtype_name(scale.dtype), bool((scale < 0).any()))
    weight = read_weight(tensors, scheme, layout, shape)
    ordered = weight.input_order is not None
    return weight, scheme.model_copy(update={"input_order": ordered})
