"""What transformers makes of the names in weight files."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def names_in_model(
    model: PreTrainedModel, key: str, mapping: list[Any], expected: dict[str, Tensor]
) -> list[str]:
    """What a key of the files helps to make: one tensor, or several where it is split.

    The rules are those of transformers' ``convert_and_load_state_dict_in_model``.
    """
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
    if name not in expected and key in expected:
        name, pattern = rename_source_key(key, [], [], prefix, expected)
    if pattern is None:
        return [name]
    targets = next(c for c in converters if pattern in c.source_patterns).target_patterns
    return [name.replace(targets[0], target) for target in targets]
