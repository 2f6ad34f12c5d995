"""Encoders of text: how far the quantized model's embeddings are from the float model's."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq.calibrate import TokenSet
from ptq.core import is_finite
from ptq.errors import CalibrationError, ModelError, UnsupportedError
from ptq.evaluation.result import as_table, as_text
from ptq.model import check_tokens, eval_mode

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Similarity:
    """Embeddings of the same texts by both models, which are means over the texts' tokens.

    Args:
        cosine_mean, cosine_p05, cosine_p01, cosine_min: cosine between the float and the quantized
            embedding of a text: mean over the texts, the value that 5% and 1% of them do not
            exceed, and the least.
        spearman: rank correlation, over all pairs of texts, of the cosine between the two texts'
            embeddings: 1 where a search by similarity ranks every pair alike.
        texts, tokens: compared.
        tokens_sha256: hash of the token ids.
        float_dtype, dtype: of the models' float parameters.
    """

    cosine_mean: float
    cosine_p05: float
    cosine_p01: float
    cosine_min: float
    spearman: float
    texts: int
    tokens: int
    tokens_sha256: str
    float_dtype: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _rows(self) -> list[tuple[str, str]]:
        worst = f"{self.cosine_p05:.5f}, {self.cosine_p01:.5f}, {self.cosine_min:.5f}"
        return [
            ("cosine with the float embedding, mean", f"{self.cosine_mean:.5f}"),
            ("worst 5%, worst 1%, least", worst),
            ("Spearman of the texts' similarities", f"{self.spearman:.5f}"),
            ("texts", f"{self.texts} of {self.tokens:,} tokens"),
            ("dtypes", f"{self.float_dtype} float, {self.dtype} quantized"),
        ]

    def __str__(self) -> str:
        return as_text(self._rows())

    def _repr_html_(self) -> str:
        return as_table(self._rows())


@torch.no_grad()
def embed(model: nn.Module, data: TokenSet, progress: Progress = iter) -> Tensor:
    """Mean over the tokens of the last hidden states: float32 [texts, H], on the CPU.

    Each text runs alone, without padding.

    Raises:
        UnsupportedError: the model gives no hidden states.
        ModelError: NaN or Inf in them.
        CalibrationError: a text is too long, or not of the model's vocabulary.
    """
    config: Any = getattr(model, "config", None)
    if config is not None:
        check_tokens(config, data.sequences, f"evaluation text {', '.join(data.source)}")
    device = next(model.parameters()).device
    rows = []
    with eval_mode(model):
        for index in progress(range(len(data.sequences))):
            ids = data.sequences[index][None].to(device)
            hidden = _hidden(model, model(input_ids=ids, output_hidden_states=True))
            rows.append(hidden[0].float().mean(0).cpu())
    found = torch.stack(rows)
    if not is_finite(found):
        raise ModelError(f"{type(model).__name__} gives NaN or Inf embeddings")
    return found


def _hidden(model: nn.Module, output: Any) -> Tensor:
    """Last hidden states [1, T, H] of a bare encoder, or of one below a head."""
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        states = getattr(output, "hidden_states", None)
        hidden = None if not states else states[-1]
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise UnsupportedError(f"{type(model).__name__} gives no hidden states to compare")
    return hidden


def compare_embeddings(
    model: nn.Module,
    data: TokenSet,
    reference: nn.Module | Tensor,
    reference_dtype: torch.dtype | None = None,
    progress: Progress = iter,
) -> Similarity:
    """Compare an encoder with the float one.

    Args:
        reference: the float model, or its embeddings (:func:`embed`) of the same texts.
        reference_dtype: of the float model's parameters, with embeddings.

    Raises:
        UnsupportedError, ModelError: as :func:`embed`.
        CalibrationError: fewer than two texts, or embeddings of another width.
    """
    if len(data.sequences) < 2:
        raise CalibrationError("comparing embeddings needs two texts at least; give more")
    if isinstance(reference, nn.Module):
        reference_dtype = next(reference.parameters()).dtype
        reference = embed(reference, data)
    found = embed(model, data, progress)
    if found.shape != reference.shape:
        raise CalibrationError(
            f"the reference's embeddings are {list(reference.shape)}, the model's "
            f"{list(found.shape)}: they are not the same model"
        )
    cosine = F.cosine_similarity(reference.double(), found.double()).sort().values
    return Similarity(
        cosine_mean=cosine.mean().item(),
        cosine_p05=_worst(cosine, 0.05),
        cosine_p01=_worst(cosine, 0.01),
        cosine_min=cosine[0].item(),
        spearman=spearman(_pairs(reference), _pairs(found)),
        texts=len(data.sequences),
        tokens=data.tokens,
        tokens_sha256=data.sha256,
        float_dtype=str(reference_dtype).removeprefix("torch."),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def _worst(ascending: Tensor, share: float) -> float:
    """The largest of the worst values that make up this share; at least one of them."""
    return ascending[max(1, int(share * len(ascending))) - 1].item()


def _pairs(embeddings: Tensor) -> Tensor:
    """Cosine of each pair of rows: float64 [pairs]."""
    directions = F.normalize(embeddings.double())
    return (directions @ directions.T)[_upper(len(embeddings))]


def _upper(count: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(count, count, 1)
    return rows, columns


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two samples [n], ties sharing their mean rank; where one of them does not
    vary, 1 if neither does, else 0."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / size) if size > 0 else float(torch.equal(x, y))


def _ranks(values: Tensor) -> Tensor:
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = count.cumsum(0).double() - (count - 1) / 2
    return ranks[place]
