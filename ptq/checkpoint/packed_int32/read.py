"""Reading a GPTQ or AWQ checkpoint, whoever wrote it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ptq.checkpoint.foreign import quantization_of
from ptq.checkpoint.foreign_read import ForeignLayer, empty_model, filled, plain_linear
from ptq.checkpoint.manifest import CONFIG
from ptq.checkpoint.native_read import usable_device
from ptq.checkpoint.packed_int32.layer import expected_tensors, read_weight
from ptq.checkpoint.packed_int32.settings import AllSettings, parse_settings
from ptq.checkpoint.shard import Stored
from ptq.checkpoint.shard_index import find_shards
from ptq.errors import CheckpointError, PTQError

METHODS = ("gptq", "awq")
"""``quant_method`` of what is read here."""
_OWN = ("qweight", "qzeros")


def read(
    directory: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """The model of a GPTQ or AWQ directory, with QuantLinear layers, in eval mode.

    Codes, scales and zero points are those of the files, bit for bit. A layer is quantized if the
    files hold codes of it. The formats have no hashes: names, shapes and dtypes are checked, not
    the bytes.

    Args:
        model: the float model, for what transformers cannot build from config.json. It becomes the
            quantized one.

    Raises:
        CheckpointError: a file or tensor is missing, left over, damaged or of another shape or
            dtype; it is named.
        UnsupportedError: a layout or scheme that ptq does not have, or act-order; the layer is
            named.
    """
    root = Path(directory).expanduser()
    device = usable_device(device)
    settings = parse_settings(quantization_of(root), root / CONFIG)
    model = empty_model(root) if model is None else model
    shards = find_shards(root)
    layers = {name: _layer(model, name, settings) for name in _quantized(shards)}
    if not layers:
        raise CheckpointError(f"{root} holds no tensor qweight, so nothing in it is quantized")
    return filled(root, model, layers, shards, device)


def _quantized(shards: Mapping[Path, Mapping[str, Stored]]) -> list[str]:
    """The layers of which the files hold codes or zero points."""
    parts = [key.rpartition(".") for header in shards.values() for key in header]
    return sorted({name for name, _, leaf in parts if leaf in _OWN})


def _layer(model: nn.Module, name: str, settings: AllSettings) -> ForeignLayer:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the files hold codes of a layer {name}, which {type(model).__name__} does not have "
            "as transformers builds it (experts of a mixture, or another model)"
        ) from None
    linear = plain_linear(name, module)
    own, shape = settings.of(name), (linear.out_features, linear.in_features)
    try:
        expected = expected_tensors(own, settings.layout, shape, linear.bias is not None)
    except PTQError as error:
        raise type(error)(f"layer {name}: {error}") from None
    return ForeignLayer(linear, expected, partial(read_weight, own, settings.layout, shape))
