"""By what a model is judged: next tokens, embeddings of text, or classes of images."""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
)

from ptq.errors import UnsupportedError

Kind = Literal["causal", "encoder", "images"]


def evaluated_as(model: nn.Module) -> Kind:
    """How :func:`ptq.evaluate` measures a model, found from its architecture; it may be on the
    meta device. A module that is not of transformers is taken for a decoder.

    Raises:
        UnsupportedError: an encoder-decoder, or a model of sound, video or several kinds of input.
    """
    if not isinstance(model, PreTrainedModel):
        return "causal"
    text = model.main_input_name == "input_ids" and not model.config.is_encoder_decoder
    if text:
        return "causal" if model.can_generate() else "encoder"
    names = {name for found in CLASSIFIERS.values() for name in _names(found)}
    if model.main_input_name == "pixel_values" and type(model).__name__ in names:
        return "images"
    raise UnsupportedError(
        f"{type(model).__name__} is no decoder of text, no encoder of text and no classifier of "
        "images, which is what can be evaluated; remove the evaluation section for this one"
    )


def _names(found: str | Sequence[str]) -> tuple[str, ...]:
    return (found,) if isinstance(found, str) else tuple(found)
