"""What a model is, from its config and shapes alone."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ptq.config import ModelConfig
from ptq.errors import ConfigError, UnsupportedError
from ptq.model import (
    ModelSource,
    load_model_config,
    load_tokenizer,
    max_positions,
    require_causal,
    require_token_ids,
    skeleton,
)
from ptq.planning import Plan, plan

GROUPS = (64, 32, 16, 8)


@dataclass(frozen=True)
class Facts:
    """A model, as far as the choice of a scheme depends on it.

    Args:
        name: class of the model.
        predicts: it gives the next token of a text, so perplexity and generation can be measured.
        reads_text: token ids are all that it needs, and it comes with a tokenizer.
        parameters: of the whole model.
        float_bytes: of its parameters, as they are loaded.
        embedding_share: of the parameters, in embeddings.
        group: largest size of groups, of 64 and its halves to 8, that divides every layer's input;
            None if there is none.
        positions: tokens in a sequence at most, None if there is no limit.
        single_file: GGUF, which cannot be streamed.
    """

    name: str
    predicts: bool
    reads_text: bool
    parameters: int
    float_bytes: int
    embedding_share: float
    group: int | None
    positions: int | None
    single_file: bool

    @property
    def larger_than_memory(self) -> bool:
        """Whether the float model and a copy of half its size do not fit this machine."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return self.float_bytes * 1.5 > memory


def look_at(model: str) -> Facts:
    """Read a model's config and count its shapes on the meta device.

    Args:
        model: hub id, directory, .gguf file, or package:NAME/FILE.

    Raises:
        ModelError: there is no such model, or it cannot be read.
        UnsupportedError: it has nothing to quantize, or is quantized already.
    """
    source = ModelSource.resolve(ModelConfig(id=model))
    config = load_model_config(source)
    empty = skeleton(config)
    made = plan(empty, "w8a16")
    embeddings = sum(x.parameters for x in made.layers if x.kind == "Embedding")
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    wide = 4 if source.gguf_file is not None else stored.itemsize
    return Facts(
        name=type(empty).__name__,
        predicts=_allows(require_causal, empty),
        reads_text=_allows(require_token_ids, empty) and load_tokenizer(source) is not None,
        parameters=made.parameters,
        float_bytes=made.parameters * wide,
        embedding_share=embeddings / max(1, made.parameters),
        group=next((size for size in GROUPS if _fits(empty, size) is not None), None),
        positions=max_positions(config),
        single_file=source.gguf_file is not None,
    )


def _fits(model: nn.Module, group: int) -> Plan | None:
    """The plan with groups of this size, if every layer can have them."""
    try:
        return plan(model, f"w4a16-g{group}")
    except ConfigError:
        return None


def _allows(check: Any, model: nn.Module) -> bool:
    try:
        check(model)
    except UnsupportedError:
        return False
    return True
