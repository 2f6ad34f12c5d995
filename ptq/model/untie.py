"""An output head that no longer shares the embedding's weight."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def forget_ties(model: nn.Module) -> None:
    """Tell transformers that no weight is tied, so that loading does not tie one."""
    if isinstance(model, PreTrainedModel):
        model.config.tie_word_embeddings = False
        model._tied_weights_keys = {}
        model.all_tied_weights_keys.clear()


def untie_head(model: Any) -> None:
    """Give the output head of a model that says which that is, and which its embedding, a copy of
    the weight that they share, if they do."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = head.weight
    assert isinstance(weight, nn.Parameter)
    if weight is embedding.weight:
        head.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        forget_ties(model)
