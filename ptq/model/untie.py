"""An output head that no longer shares the embedding's weight."""

from torch import nn
from transformers import PreTrainedModel


def forget_ties(model: nn.Module) -> None:
    """Tell transformers that no weight is tied, so that loading does not tie one."""
    if isinstance(model, PreTrainedModel):
        model.config.tie_word_embeddings = False
        model._tied_weights_keys = {}
        model.all_tied_weights_keys.clear()


def untie_head(model: nn.Module, embedding: nn.Module, head: nn.Module) -> None:
    """Give the head a copy of the weight that it shares with the embedding, if it does."""
    weight = head.weight
    assert isinstance(weight, nn.Parameter)
    if weight is embedding.weight:
        head.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        forget_ties(model)
