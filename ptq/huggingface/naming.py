"""Module names in two classes of one model: with a head, with another, and without."""

import copy

from torch import nn
from transformers import PreTrainedModel

from ptq.model import named_class, skeleton


def name_in(model: PreTrainedModel, name: str) -> str | None:
    """What the module of this name is called in ``model``, None if it has none.

    A class with a head puts the base model's prefix before its names.
    """
    prefix = f"{model.base_model_prefix}."
    for known in (name, name.removeprefix(prefix), f"{prefix}{name}"):
        if _has(model, known):
            return known
    return None


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def as_saved(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or one on the meta device, of the class whose checkpoint is loaded.

    transformers loads the checkpoint of one class into another: what only the other has is new, and
    what it does not have is left out. A class that transformers does not know counts as the same.
    """
    cls = named_class(model.config)
    if cls is None or cls.__name__ == type(model).__name__:
        return model
    return skeleton(copy.deepcopy(model.config), model.dtype)
