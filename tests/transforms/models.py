"""Blocks of tiny models of several families, with the call that the model makes of them."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)

from tests.helpers import SIZES


@dataclass
class Called:
    """A block of a model and what the model called it with."""

    block: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        out = self.block(*self.arguments, **self.keywords)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def inputs(self, names: list[str] | tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Rows [R, K] that the named layers read."""
        seen: dict[str, torch.Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
                seen[name] = given[0].flatten(0, -2).float()

            return keep

        handles = [self.block.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
        self.run()
        for handle in handles:
            handle.remove()
        return seen

    def linears(self) -> list[str]:
        return [n for n, m in self.block.named_modules() if type(m) is nn.Linear]


class _Seen(Exception):
    pass


def first_call(model: nn.Module, block: nn.Module, tokens: torch.Tensor) -> Called:
    """The call that the model makes of a block."""
    kept: list[Called] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        kept.append(Called(module, arguments, keywords))
        raise _Seen

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    with suppress(_Seen):
        model(tokens, use_cache=False)
    handle.remove()
    return kept[0]


OPT_SIZES = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "word_embed_proj_dim": 32,
}
FAMILIES: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "llama": (lambda: LlamaConfig(**SIZES, num_key_value_heads=2), "layers.0"),
    "llama-mha": (lambda: LlamaConfig(**SIZES), "layers.0"),
    "llama-relu": (lambda: LlamaConfig(**SIZES, hidden_act="relu"), "layers.0"),
    "bert": (lambda: BertConfig(**SIZES), "encoder.layer.0"),
    "gemma2": (
        lambda: Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, pad_token_id=0),
        "layers.0",
    ),
    "opt": (lambda: OPTConfig(**OPT_SIZES), "decoder.layers.0"),
    "gpt_neox": (lambda: GPTNeoXConfig(**SIZES), "layers.0"),
    "mixtral": (
        lambda: MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
        "layers.0",
    ),
}
"""A configuration and the name of a block, by family."""


def block_of(family: str, dtype: torch.dtype = torch.float32, rows: int = 3) -> Called:
    """The first block with random weights, norms' and biases' included, called on tokens."""
    config, name = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModel.from_config(config(), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    tokens = torch.randint(1, 97, (rows, 11), generator=torch.Generator().manual_seed(1))
    return first_call(model, model.get_submodule(name), tokens)
