"""What a model computes for fixed inputs, as hashes, which two processes can compare."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.checkpoint.hashing import tensor_sha256
from ptq.kernels import aligned
from ptq.modules import QuantEmbedding, QuantLinear, quantized_modules

Outputs = list[tuple[str, str]]
"""What computed it (``"layer NAME"`` or ``"the model"``), and the SHA-256 of its output's bytes."""

_ALIGNMENT = 64


def decodes_text(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether token ids alone are an input of the model, a decoder of transformers."""
    return (
        isinstance(model, PreTrainedModel)
        and model.main_input_name == "input_ids"
        and model.can_generate()
        and not model.config.is_encoder_decoder
    )


@torch.no_grad()
def model_outputs(model: nn.Module) -> Outputs:
    """Of a decoder of text: of every quantized layer and of the model, in the order of its run on
    transformers' fixed example (15 tokens) and on one token. Of any other model (encoders, images,
    sound): :func:`layer_outputs`.
    """
    if not decodes_text(model):
        return layer_outputs(quantized_modules(model), float_dtype(model))
    found: Outputs = []
    example = model.dummy_inputs["input_ids"].to(model.device)
    with _evaluating(model), _recording(quantized_modules(model), found):
        for ids in (example, example[:1, :1]):
            found.append(("the model", tensor_sha256(model(input_ids=ids, use_cache=False)[0])))
    return found


@torch.no_grad()
def layer_outputs(
    layers: Mapping[str, QuantLinear | QuantEmbedding], dtype: torch.dtype
) -> Outputs:
    """Of each layer for two made-up rows of this dtype, of each embedding for its first rows."""
    found = []
    for name, layer in layers.items():
        device = layer.codes.device
        if isinstance(layer, QuantEmbedding):
            y = layer(torch.arange(min(3, layer.num_embeddings), device=device))
        else:
            rows = torch.linspace(-2, 2, 2 * layer.in_features, dtype=dtype, device=device)
            y = layer(rows.reshape(2, -1))
        found.append((f"layer {name}", tensor_sha256(y)))
    return found


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that no checkpoint holds, such as rotary frequencies, by name."""
    stored = model.state_dict().keys()
    return {n: b for n, b in model.named_buffers(remove_duplicate=False) if n not in stored}


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first float parameter, float32 if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def align_parameters(model: nn.Module) -> None:
    """Copy parameters that lie at odd addresses, as those of a mapped file may, to memory of torch.

    The product of one float32 row with a matrix has other last bits where the matrix is not at a
    multiple of 16 bytes; a checkpoint is loaded to multiples of 64. What was shared stays shared.
    """
    moved: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    for parameter in model.parameters():
        data = parameter.data
        if data.device.type == "cpu" and data.data_ptr() % _ALIGNMENT:
            place = (data.data_ptr(), data.shape, data.stride())
            parameter.data = moved.setdefault(place, aligned(data, _ALIGNMENT))


@contextmanager
def _recording(modules: Mapping[str, nn.Module], found: Outputs) -> Iterator[None]:
    """Within it, every output of the modules is hashed."""

    def hook(name: str) -> Any:
        return lambda _module, _inputs, y: found.append((f"layer {name}", tensor_sha256(y)))

    handles = [m.register_forward_hook(hook(name)) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in eval mode; then each module is as it was."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
