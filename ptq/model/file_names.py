"""What the files of a model call its layers, where transformers has other names for them in memory.

transformers renames what it loads, and makes one tensor of what the files have apart: the experts
of a mixture, a gate and what it gates. Files of other toolkits keep the names of the float model's
files, and of those parts.
"""

from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from ptq.errors import UnsupportedError
from ptq.model.experts import Experts
from ptq.model.replace import stands_for

_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""What llm-compressor and GPTQModel call the parts of an expert's layer, whatever its files do."""


class FileNames:
    """The names of one model's layers and tensors in files.

    Args:
        model: of a class that transformers does not know, it has the same names everywhere.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._mapping: list[Any] = []
        if isinstance(model, PreTrainedModel):
            self._mapping = get_model_conversion_mapping(model, add_legacy=False)

    @cached_property
    def _loading(self) -> list[Any]:
        return [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]

    @cached_property
    def _saving(self) -> list[Any]:
        """As transformers' ``revert_weight_conversion``."""
        kept = [entry for entry in self._mapping if not isinstance(entry, PrefixChange)]
        return [entry.reverse_transform() for entry in reversed(kept)]

    def in_file(self, key: str) -> str:
        """A tensor's name in files, by the name that it has in the model."""
        return self._renamed(key, [e for e in self._saving if isinstance(e, WeightRenaming)])

    def in_model(self, key: str) -> str:
        """A tensor's name in the model, by its name in files; parts keep names of their own."""
        return self._renamed(key, self._loading)

    def layer_in_model(self, name: str) -> str:
        """As :meth:`in_model`, for a layer; a name that only the model has is that already."""
        found = self.in_model(f"{name}.weight").removesuffix(".weight")
        return name if not self._has(found) and self._has(name) else found

    def parts(self, name: str) -> tuple[str, ...]:
        """What files call the rows of a linear layer of the unfolded model, from the first on.

        Raises:
            UnsupportedError: they do not have them as layers.
        """
        found = self._expert(name)
        key = f"{name}.weight" if found is None else f"{found[0]}.{found[2]}"
        renamed, converter = self._split(key)
        if found is None:
            return (self._layer_in_file(name),)
        if converter is None:
            raise UnsupportedError(
                f"layer {name} is a part of {key}, which the files of {type(self.model).__name__} "
                "hold as one tensor, so that no reader of other formats would find it; "
                "save it with ptq.save, or leave it float"
            )
        first, *_ = targets = converter.target_patterns
        keys = (renamed.replace(first, target).replace("*", found[1], 1) for target in targets)
        return tuple(self.in_file(key).removesuffix(".weight") for key in keys)

    def usual_parts(self, name: str) -> tuple[str, ...]:
        """As :meth:`parts`, by the names that llm-compressor and vLLM's configs have for experts.

        Raises:
            UnsupportedError: the rows of the two parts alternate.
        """
        found = self._expert(name)
        if found is None:
            return (self._layer_in_file(name),)
        experts, number, leaf = found
        if getattr(stands_for(self.model.get_submodule(experts)), "is_transposed", False):
            raise UnsupportedError(
                f"layer {name} of {type(self.model).__name__} has its gate between its other rows, "
                "which ptq does not take apart; keep the ptq format, or leave the experts float"
            )
        return tuple(self._layer_in_file(f"{experts}.{number}.{part}") for part in _PARTS[leaf])

    def are_apart(self, experts: str) -> bool:
        """Whether files have the matrices of each expert by themselves."""
        return self._split(f"{experts}.down_proj")[1] is not None

    def _split(self, key: str) -> tuple[str, Any]:
        """What takes a tensor apart into equal numbers of rows, and the first part's name."""
        converters = [e for e in self._saving if isinstance(e, WeightConverter)]
        renamed, pattern = rename_source_key(key, [], converters, reverse=True)
        found = next((c for c in converters if pattern in c.source_patterns), None)
        known = found is not None and all(
            isinstance(op, SplitModulelist) or (isinstance(op, Chunk) and op.dim == 1)
            for op in found.operations
        )
        return renamed, found if known else None

    def _layer_in_file(self, name: str) -> str:
        return self.in_file(f"{name}.weight").removesuffix(".weight")

    def _expert(self, name: str) -> tuple[str, str, str] | None:
        """The experts that a layer is of, its number among them, and which of its layers it is."""
        experts, number, leaf = ("", "", *name.rsplit(".", 2))[-3:]
        inside = self._has(experts) and isinstance(self.model.get_submodule(experts), Experts)
        return (experts, number, leaf) if inside else None

    def _has(self, name: str) -> bool:
        try:
            self.model.get_submodule(name)
        except AttributeError:
            return False
        return True

    @staticmethod
    def _renamed(key: str, renamings: list[Any]) -> str:
        return rename_source_key(key, renamings, [])[0] if renamings else key
