"""Reading a GPTQ or AWQ checkpoint, whoever wrote it."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from ptq.checkpoint.foreign import quantization_of
from ptq.checkpoint.foreign_files import ForeignFiles, foreign_files
from ptq.checkpoint.foreign_read import ForeignLayer, empty_model, filled, plain_linear
from ptq.checkpoint.manifest import CONFIG
from ptq.checkpoint.native_read import usable_device
from ptq.checkpoint.packed_int32.layer import expected_tensors, read_weight
from ptq.checkpoint.packed_int32.settings import AllSettings, parse_settings
from ptq.errors import CheckpointError, PTQError, UnsupportedError

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
    with foreign_files(root, model) as files:
        layers = {name: _layer(model, name, settings, files) for name in _quantized(files)}
        if not layers:
            raise CheckpointError(f"{root} holds no tensor qweight, so nothing in it is quantized")
        return filled(files, model, layers, device)


def _quantized(files: ForeignFiles) -> list[str]:
    """The layers of which the files hold codes or zero points."""
    keys = [key.rpartition(".") for header in files.shards.values() for key in header]
    whole = {part: name for name, parts in files.parts.items() for part in parts}
    return sorted({whole.get(name, name) for name, _, leaf in keys if leaf in _OWN})


def _layer(model: nn.Module, name: str, settings: AllSettings, files: ForeignFiles) -> ForeignLayer:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the files hold codes of a layer {name}, which {type(model).__name__} does not have "
            "as transformers builds it; config.json is of another model, copy it again"
        ) from None
    linear = plain_linear(name, module)
    parts = files.parts_of(name)
    own, *others = (settings.of(files.called(part)) for part in parts)
    if any(other != own for other in others):
        raise UnsupportedError(
            f"layers {' and '.join(parts)} are one layer, {name}, in the model that transformers "
            "builds, but config.json has different settings for them, which ptq cannot load"
        )
    shape = linear.out_features // len(parts), linear.in_features
    try:
        expected = expected_tensors(own, settings.layout, shape, linear.bias is not None)
    except PTQError as error:
        raise type(error)(f"layer {name}: {error}") from None
    return ForeignLayer(linear, expected, partial(read_weight, own, settings.layout, shape))
