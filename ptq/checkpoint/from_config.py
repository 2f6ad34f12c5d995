"""The empty model that a config.json describes, whoever wrote the file.

transformers builds whatever a config says: a billion blocks, a layer of 10^30 columns, a class that
is to be fetched. So nothing is fetched or run, what is not a number where one is needed is an
error of one line, and building stops where the model has more parameters than the files could hold.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from ptq.checkpoint.json_file import read_json
from ptq.checkpoint.manifest import CONFIG, GENERATION_CONFIG
from ptq.checkpoint.paths import inside
from ptq.errors import CheckpointError, ModelError, UnsupportedError
from ptq.model import named_class, skeleton

NONSENSE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    ModelError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers raises for values that make no sense; it has no error of its own for them."""
_FEW = 100  # parameters that any model may have, however few tensors its files hold


def load_config(root: Path) -> PretrainedConfig:
    """The transformers config of a directory, without what it says about quantization.

    Raises:
        CheckpointError: it cannot be used.
    """
    with _usable(inside(root, CONFIG)):
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
    assert isinstance(config, PretrainedConfig)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def generation_config(root: Path) -> GenerationConfig:
    """The generation config of a directory, which has one.

    Raises:
        CheckpointError: it cannot be used.
    """
    with _usable(inside(root, GENERATION_CONFIG)):
        return GenerationConfig.from_pretrained(root)


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Within it, transformers reads a JSON file, which is read for mistakes of its own before."""
    read_json(path)
    try:
        yield
    except NONSENSE as error:
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}") from None


def model_of(root: Path, config: PretrainedConfig, name: str, stored: int) -> PreTrainedModel:
    """The model of a config, of the class ``config.architectures`` names, on the meta device.

    Args:
        name: what the directory holds, for the error.
        stored: the number of tensors in the weight files.

    Raises:
        UnsupportedError: transformers does not have the class.
        CheckpointError: the config makes no sense, or is not that of the weight files.
    """
    if named_class(config) is None:
        raise UnsupportedError(
            f"{root} holds a {name}, which transformers {transformers.__version__} does not have; "
            "ptq does not run code that comes with a model (trust_remote_code): build it and pass "
            "it: ptq.load(directory, model=...)"
        )
    try:
        with _at_most(2 * stored + _FEW, root):
            return skeleton(config)
    except CheckpointError:
        raise
    except NONSENSE as error:
        raise CheckpointError(
            f"no model can be built from {root / CONFIG}: {first_line(error)}"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextmanager
def _at_most(limit: int, root: Path) -> Iterator[None]:
    """Within it, this thread can make so many parameters."""
    made, thread = 0, threading.get_ident()

    def count(_module: nn.Module, _name: str, _parameter: Any) -> None:
        nonlocal made
        if threading.get_ident() != thread:
            return
        made += 1
        if made > limit:
            raise CheckpointError(
                f"{root / CONFIG} describes a model of more than {limit:,} tensors, the weight "
                "files hold fewer; it is damaged or of another model, copy it again"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
