"""What a model can take: how many tokens, and which."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ptq.errors import CalibrationError, UnsupportedError


def max_positions(config: PretrainedConfig) -> int | None:
    """Tokens that the model has positions for; None where it has no limit or names none."""
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_tokens(config: PretrainedConfig, sequences: Sequence[torch.Tensor], where: str) -> None:
    """Refuse sequences that are too long for a model, or not of its vocabulary.

    Args:
        sequences: int64 [T] each.
        where: names the text in the error, and what to change.

    Raises:
        CalibrationError: with the length or the token id.
    """
    limit, vocabulary = max_positions(config), getattr(config, "vocab_size", None)
    longest = max(len(sequence) for sequence in sequences)
    if limit is not None and longest > limit:
        raise CalibrationError(
            f"{where} has {longest} tokens in one piece, the model has {limit} positions; "
            "make it shorter"
        )
    largest = max(int(sequence.max()) for sequence in sequences)
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise CalibrationError(
            f"{where} has token id {largest}, the model's vocabulary has {vocabulary}; "
            "the tokenizer belongs to another model"
        )


def require_causal(model: nn.Module) -> None:
    """Refuse models whose logits are not those of the next token.

    Raises:
        UnsupportedError: an encoder, an encoder-decoder, or a model without logits.
    """
    if isinstance(model, PreTrainedModel) and (
        not model.can_generate() or model.config.is_encoder_decoder
    ):
        raise UnsupportedError(
            f"{type(model).__name__} is no decoder that predicts the next token: perplexity needs "
            "a causal language model; remove the evaluation section for this one"
        )


def require_token_ids(model: nn.Module) -> None:
    """Refuse models that calibration text alone cannot run.

    Raises:
        UnsupportedError: it takes images or sound, or is an encoder-decoder.
    """
    if isinstance(model, PreTrainedModel) and (
        model.main_input_name != "input_ids" or model.config.is_encoder_decoder
    ):
        raise UnsupportedError(
            f"{type(model).__name__} needs more than token ids: calibrate it in Python, with "
            "ptq.quantize(model, scheme, calibration=batches of keyword arguments)"
        )
