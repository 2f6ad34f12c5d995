"""Output heads that hold the very tensors of the token embedding."""

from torch import nn

from ptq.modules.buffers import share, shares
from ptq.modules.quant_embedding import QuantEmbedding
from ptq.modules.quant_linear import QuantLinear


def tie(embedding: QuantEmbedding, head: QuantLinear) -> None:
    """Let the head hold the embedding's tensors, also after ``model.to(device)``."""
    share(embedding, head)
    head.tied_to = (embedding,)


def tie_shared(model: nn.Module) -> None:
    """Tie each quantized head whose codes are those of a quantized embedding."""
    embeddings = [m for m in model.modules() if isinstance(m, QuantEmbedding)]
    for head in model.modules():
        if isinstance(head, QuantLinear):
            for embedding in embeddings:
                if shares(embedding, head):
                    tie(embedding, head)
