"""Models that predict no next token: their data, and the comparison with the float model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptq.calibrate import Progress, TokenSet, evaluation_sentences
from ptq.config import EvaluationConfig, make_section
from ptq.errors import CalibrationError, ConfigError
from ptq.evaluation.encoder import Similarity, compare_embeddings, embed
from ptq.evaluation.gate import figure_names
from ptq.evaluation.images import ImageAgreement, ImageSet, classify, compare_classes
from ptq.evaluation.kind import Kind
from ptq.evaluation.result import Evaluation, Perplexity

RESULTS: dict[Kind, type] = {"encoder": Similarity, "images": ImageAgreement}
"""What comparing a model of a kind gives, beside ``Evaluation`` for causal ones."""


def evaluation_data(kind: Kind, section: EvaluationConfig, processor: Any) -> TokenSet | ImageSet:
    """Sentences for encoders, images for classifiers of images.

    Args:
        processor: the tokenizer, or the image processor.

    Raises:
        CalibrationError: the data cannot be used.
        UnsupportedError: images, and Pillow is not installed.
    """
    if kind == "encoder":
        return evaluation_sentences(section, processor)
    options = {"subset": section.subset, "split": section.split, "column": section.column}
    return ImageSet(section.data, processor, section.windows, **options)  # type: ignore[arg-type]


def known_figures(kind: Kind | None, tasks: bool = False, alone: bool = False) -> list[str]:
    """Names of the figures that an evaluation gives, for :func:`parse_conditions`.

    Args:
        kind: of the model; None where it is not known yet: those of every kind.
        tasks: lm-eval's tasks are run as well.
        alone: there is no float model to compare with.
    """
    causal = [Perplexity] if alone else [Evaluation, Perplexity]
    results = {"causal": causal, **{name: [result] for name, result in RESULTS.items()}}
    chosen = [r for name, found in results.items() if kind in (None, name) for r in found]
    names = [name for result in chosen for name in figure_names(result)]
    cached = [f"kv_cache.{name}" for name in names] if kind in (None, "causal") else []
    return list(dict.fromkeys([*names, *cached, *(["tasks.*"] if tasks else [])]))


@dataclass(eq=False)
class HeldReference:
    """What the float model gives, held in memory while it is quantized in place."""

    data: TokenSet | ImageSet
    found: Tensor | None = field(default=None, init=False)
    dtype: torch.dtype | None = field(default=None, init=False)

    def record(self, model: nn.Module, progress: Progress = iter) -> None:
        """Run the float model.

        Raises:
            CalibrationError, ModelError, UnsupportedError: it cannot take the data.
        """
        self.dtype = next(model.parameters()).dtype
        if isinstance(self.data, TokenSet):
            self.found = embed(model, self.data, progress)
        else:
            self.found = classify(model, self.data, progress)

    def compare(self, model: nn.Module, progress: Progress = iter) -> Similarity | ImageAgreement:
        """The quantized model against what was recorded.

        Raises:
            CalibrationError, ModelError, UnsupportedError: it cannot take the data.
        """
        assert self.found is not None, "record comes first"
        if isinstance(self.data, TokenSet):
            return compare_embeddings(model, self.data, self.found, self.dtype, progress)
        return compare_classes(model, self.data, self.found, self.dtype, progress)


def evaluate_other(
    kind: Kind,
    model: nn.Module,
    data: str | os.PathLike[str] | Sequence[str] | TokenSet | ImageSet,
    processor: Any,
    reference: object,
    windows: int,
    context: int,
    progress: Progress,
) -> Similarity | ImageAgreement:
    """:func:`ptq.evaluate` of an encoder or an image classifier.

    Raises:
        ConfigError: there is no float model to compare with.
        CalibrationError, ModelError, UnsupportedError: a model cannot take the data.
    """
    if not isinstance(reference, nn.Module):
        raise ConfigError(
            f"{type(model).__name__} predicts no next token, so it is measured by how near it is "
            "to the float model: pass that as reference"
        )
    if not isinstance(data, TokenSet | ImageSet):
        if processor is None:
            raise CalibrationError(
                "evaluating needs the tokenizer, or the image processor: pass tokenizer=..."
            )
        sources = [data] if isinstance(data, str | os.PathLike) else data
        names = [os.fspath(source) for source in sources]
        sizes = {"windows": windows, "context": context}
        section = make_section(EvaluationConfig, "evaluate", data=names, **sizes)
        data = evaluation_data(kind, section, processor)
    held = HeldReference(data)
    held.record(reference)
    return held.compare(model, progress)
