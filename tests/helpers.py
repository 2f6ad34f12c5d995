"""Tiny models, and the plainest way to quantize them: round to nearest, no plan, no calibration."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ptq.config import Scheme, preset
from ptq.core import QuantizedWeight, choose_qparams, quantize
from ptq.model import replace_module
from ptq.modules import QuantLinear

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
"""Of the tiny models."""


def tiny_llama(
    *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LlamaForCausalLM:
    """Two blocks, hidden 32, vocabulary 97, random weights, in eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def tiny_bert(*, seed: int = 0) -> BertModel:
    """Two layers, hidden 32, biases everywhere, random weights, in eval mode."""
    torch.manual_seed(seed)
    config = BertConfig(**SIZES)
    return BertModel._from_config(config).eval()


def tiny_tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Token ids [rows, length] for the tiny models."""
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def quant_linear(linear: nn.Linear, scheme: Scheme) -> QuantLinear:
    """Round to nearest over the range of each part; a made-up static input scale if needed."""
    w, a = scheme.weights, scheme.activations
    weight, gran, fmt = linear.weight.detach(), w.granularity_value, w.number_format
    parts = gran.split(weight.float())
    qparams = choose_qparams(
        parts.amin(-1),
        parts.amax(-1),
        fmt,
        symmetric=w.symmetric,
        signed_scale=w.signed_scale,
        scale_dtype=w.torch_scale_dtype,
        power_of_two=w.power_of_two_scale,
    )
    codes = quantize(weight, qparams.scale, qparams.zero_point, fmt, gran)
    plain = QuantizedWeight.from_codes(codes, qparams.scale, qparams.zero_point, fmt, gran)
    static = a is not None and a.mode == "static"
    quantized = QuantizedWeight(
        plain.packed,
        plain.scale,
        plain.zero_point,
        fmt,
        gran,
        plain.shape,
        torch.tensor(0.05) if static else None,
        torch.tensor(3, dtype=torch.int32) if static and a and not a.symmetric else None,
    )
    return QuantLinear(quantized, scheme, None if linear.bias is None else linear.bias.detach())


def quantize_linears(model: nn.Module, scheme: Scheme | str, *, head: bool = False) -> nn.Module:
    """Replace the model's linear layers in place; the output head only if ``head`` says so."""
    if isinstance(scheme, str):
        scheme = preset(scheme)
    kept = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (head or module is not kept):
            replace_module(model, name, quant_linear(module, scheme))
    return model
