"""Saying in the model itself that it is quantized, in the way that transformers looks for."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from ptq.checkpoint.card import tags
from ptq.checkpoint.description import describe
from ptq.checkpoint.tensors import distinct_tensors
from ptq.kv_cache import cache_settings
from ptq.modules import quantized_modules


def declare_quantized(model: nn.Module) -> None:
    """Make ``model.save_pretrained`` of a transformers model with quantized layers write a ptq
    checkpoint; nothing is done to other models.

    Sets ``model.config.quantization_config`` and ``model.hf_quantizer``, and adds model tags.

    Raises:
        CheckpointError: a tensor cannot be stored; it is named.
    """
    modules = quantized_modules(model)
    if not isinstance(model, PreTrainedModel) or not modules:
        return
    _, aliases = distinct_tensors(model, model.state_dict().keys())
    schemes = {name: module.scheme for name, module in modules.items()}
    section = describe(schemes, aliases, cache_settings(model))
    config: Any = AutoQuantizationConfig.from_dict(section)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
    model.add_model_tags(tags(model))  # for the card that push_to_hub writes
