"""The tokenizer, or the image processor, that comes with a model."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils.hub import cached_file

from ptq.errors import ModelError
from ptq.model.source import ModelSource

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, or None if it comes without one.

    Raises:
        ModelError: there is one, but transformers cannot read it.
    """
    try:
        if source.gguf_file is None and not _has_files(source):
            return None
        return AutoTokenizer.from_pretrained(source.path, **source.arguments)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelError(
            f"tokenizer of {source}: {reason:.200}; repair its tokenizer files, or remove them"
        ) from None


def load_image_processor(source: ModelSource) -> Any:
    """What makes a model's input of an image.

    Raises:
        ModelError: there is none, or transformers cannot read it.
    """
    processors: Any = AutoImageProcessor
    try:
        return processors.from_pretrained(source.path, **source.arguments)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ModelError(
            f"image processor of {source}: {reason:.200}; images need preprocessor_config.json "
            "beside the model"
        ) from None


def _has_files(source: ModelSource) -> bool:
    """Whether the directory or hub repository has any file that tokenizers are made of."""
    if Path(source.path).is_dir():
        return any((Path(source.path) / name).is_file() for name in _FILES)
    revision = source.options.revision
    return any(
        cached_file(
            source.path, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        for name in _FILES
    )
