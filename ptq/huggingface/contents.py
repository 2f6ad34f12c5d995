"""What the weight files of a checkpoint hold, from their headers."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import dot_natural_key

from ptq.checkpoint.shard import Stored, dtype_name, read_whole_header
from ptq.errors import CheckpointError
from ptq.model import names_in_model


@dataclass(frozen=True)
class Contents:
    """The tensors of weight files, by their names there; prints as the file or directory.

    Args:
        files: by tensor, the file that holds it.
        headers: the tensors of each file.
        metadata: what the header of each file says besides.
    """

    root: Path
    tensors: Mapping[str, Stored]
    files: Mapping[str, Path]
    headers: Mapping[Path, Mapping[str, Stored]]
    metadata: Mapping[Path, Mapping[str, str]]

    def __str__(self) -> str:
        files = set(self.files.values())
        return str(files.pop() if len(files) == 1 else self.root)

    def places(self, model: PreTrainedModel, wanted: dict[str, Tensor]) -> dict[str, str]:
        """The names that transformers gives the tensors in the model, each with that in a file."""
        mapping = get_model_conversion_mapping(model)
        return {
            name: key
            for key in sorted(self.tensors, key=dot_natural_key)
            for name in names_in_model(model, key, mapping, wanted)
        }

    def check(self, name: str, tensor: Tensor, key: str, exact: bool) -> None:
        """The tensor ``key`` of the files fits the place ``name`` of the model.

        Args:
            exact: the dtype must be the same; else any float dtype fits a float tensor.

        Raises:
            CheckpointError: it does not.
        """
        stored = self.tensors[key]
        renamed = not (name.endswith(key) or key.endswith(name))  # transformers may convert it
        kinds = (stored.dtype.is_floating_point, tensor.is_floating_point())
        same = stored.dtype == tensor.dtype if exact else kinds[0] == kinds[1]
        if not same or (stored.shape != tuple(tensor.shape) and not renamed):
            raise CheckpointError(
                f"{self.files[key]}: tensor {key} is {dtype_name(stored.dtype)} "
                f"{list(stored.shape)}, but the model needs {dtype_name(tensor.dtype)} "
                f"{list(tensor.shape)}; config.json and the weights are not of one checkpoint, "
                "copy it again"
            )


def read_contents(files: Sequence[str]) -> Contents:
    """The headers of the files.

    Raises:
        CheckpointError: there are none, one is not a whole safetensors file, or two hold the same
            tensor.
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"a ptq checkpoint is read from .safetensors files, here are {list(files)}; give "
            "from_pretrained the directory, without state_dict"
        )
    root = Path(files[0]).parent
    if any(Path(os.path.abspath(file)).parent != Path(os.path.abspath(root)) for file in files):
        raise CheckpointError(
            f"the index of {root} names weight files in several directories; somebody has changed "
            "the checkpoint, do not use it"
        )
    tensors: dict[str, Stored] = {}
    places: dict[str, Path] = {}
    read = {path: read_whole_header(path) for path in map(Path, files)}
    for path, (header, _) in read.items():
        for key, stored in header.items():
            if key in tensors:
                raise CheckpointError(
                    f"{path}: tensor {key} is in {places[key].name} as well; copy the whole "
                    "checkpoint again"
                )
            tensors[key], places[key] = stored, path
    headers = {path: header for path, (header, _) in read.items()}
    return Contents(
        root, tensors, places, headers, {path: found for path, (_, found) in read.items()}
    )
