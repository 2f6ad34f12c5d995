"""What a checkpoint has to pass before it appears."""

from pathlib import Path
from typing import Literal, get_args

from torch import nn

from ptq.checkpoint.fresh import verify_in_fresh_process
from ptq.checkpoint.verify import verify_bytes
from ptq.errors import CheckpointError, ConfigError

Verify = Literal["files", "process"]
"""Every byte against its hash; or that, loaded and run in a fresh process."""


def verify_written(directory: Path, model: nn.Module, how: Verify) -> str:
    """Check what has just been written of a model; returns what was compared, in words.

    Raises:
        CheckpointError: it is not what is in memory; the tensor, file or layer is named.
    """
    if how == "process":
        return verify_in_fresh_process(directory, model)
    problems = verify_bytes(directory)
    if problems:
        raise CheckpointError(f"what was written does not read back: {problems[0]}")
    return "every byte by its hash"


def check_how(verify: str) -> None:
    """Whether it is a :data:`Verify`.

    Raises:
        ConfigError: it is not.
    """
    if verify not in get_args(Verify):
        raise ConfigError(f"verify is {verify!r}; choose from {', '.join(get_args(Verify))}")
