"""Documents to token sequences, and sequences to batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq.calibrate.documents import Document
from ptq.calibrate.sources import load_documents
from ptq.config import CalibrationConfig, EvaluationConfig
from ptq.errors import CalibrationError

_SHORTEST = 16  # tokens; shorter pieces of a document are left out


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token sequences and where they came from.

    Args:
        sequences: int64 [T] each.
        sha256: over the token ids and the lengths.
        documents: number of documents that were read.
        source: as the configuration names it.
    """

    sequences: tuple[Tensor, ...]
    sha256: str
    documents: int
    source: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)


def calibration_tokens(config: CalibrationConfig, tokenizer: Any) -> TokenSet:
    """Cut documents into pieces of at most ``sequence_length`` and choose ``samples`` of them.

    The choice is a permutation seeded with ``config.seed``. Pieces below 16 tokens are left out.

    Raises:
        CalibrationError: there are fewer pieces than samples.
    """
    documents = load_documents(
        config.data, subset=config.subset, split=config.split, column=config.column
    )
    shortest = min(_SHORTEST, config.sequence_length)
    pieces = [
        piece
        for ids in _tokenize(documents, tokenizer)
        for piece in torch.split(ids, config.sequence_length)
        if len(piece) >= shortest
    ]
    if len(pieces) < config.samples:
        remedy = (
            f"give more text or set calibration.samples: {len(pieces)}"
            if pieces
            else "give more text"
        )
        raise CalibrationError(
            f"calibration text {', '.join(config.data)} gives {len(pieces)} sequences of "
            f"{shortest} to {config.sequence_length} tokens, {config.samples} are asked for; "
            f"{remedy}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(pieces), generator=generator)[: config.samples]
    return token_set([pieces[i] for i in order.tolist()], len(documents), config.data)


def evaluation_windows(config: EvaluationConfig, tokenizer: Any) -> TokenSet:
    """The first ``windows`` windows of exactly ``context`` tokens, without overlap.

    All documents are joined, in order; what is left at the end is dropped.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    documents = load_documents(
        config.data, subset=config.subset, split=config.split, column=config.column
    )
    ids = torch.cat(list(_tokenize(documents, tokenizer)))
    count = min(config.windows, len(ids) // config.context)
    if count == 0:
        raise CalibrationError(
            f"evaluation text {', '.join(config.data)} has {len(ids)} tokens, fewer than one "
            f"window of {config.context}; give more text or lower evaluation.context"
        )
    return token_set(
        list(torch.split(ids[: count * config.context], config.context)),
        len(documents),
        config.data,
    )


def overlap(calibration: TokenSet, evaluation: TokenSet, length: int = 32) -> float:
    """The share of the evaluation tokens that stand in runs of ``length`` tokens which are in the
    calibration text too; figures on them flatter. Windows are compared at whole multiples of
    ``length``, calibration text at every position."""
    seen = {
        tuple(run)
        for sequence in calibration.sequences
        if len(sequence) >= length
        for run in sequence.unfold(0, length, 1).tolist()
    }
    runs = [
        tuple(run)
        for sequence in evaluation.sequences
        if len(sequence) >= length
        for run in sequence.unfold(0, length, length).tolist()
    ]
    return sum(run in seen for run in runs) / max(1, len(runs))


def _tokenize(documents: Sequence[Document], tokenizer: Any) -> Iterator[Tensor]:
    for document in documents:
        if document.messages is None:
            # A document may be longer than the model's context: it is cut afterwards.
            ids = tokenizer(document.text, verbose=False)["input_ids"]
        else:
            ids = _chat_ids(document, tokenizer)
        yield torch.tensor(ids, dtype=torch.int64)


def _chat_ids(document: Document, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            "the data has chat messages, but the tokenizer has no chat template; use text instead"
        )
    messages = list(document.messages or ())
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages[:4])
        raise CalibrationError(
            f"the tokenizer's chat template refuses a conversation (roles {roles} ...): {error}"
        ) from None
    # The template writes the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def token_set(sequences: list[Tensor], documents: int, source: Sequence[str]) -> TokenSet:
    """The sequences, int64 [T] each, with their hash."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        digest.update(sequence.numpy().tobytes())
    # Copies, because a view would keep the whole text's ids alive.
    copies = tuple(sequence.clone() for sequence in sequences)
    return TokenSet(copies, digest.hexdigest(), documents, tuple(source))


def batches(
    tokens: TokenSet, batch_size: int, pad_token_id: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Batches of at most ``batch_size`` sequences, padded on the right.

    Yields:
        ``input_ids`` and ``attention_mask`` (0 where padded), int64 [B, T].
    """
    for start in range(0, len(tokens.sequences), batch_size):
        sequences = tokens.sequences[start : start + batch_size]
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        yield {"input_ids": ids, "attention_mask": mask}
