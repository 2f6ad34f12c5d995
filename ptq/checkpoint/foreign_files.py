"""The files of another toolkit's checkpoint, their tensors by the names of the unfolded model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ptq.checkpoint.shard import Stored
from ptq.checkpoint.shard_index import find_shards
from ptq.errors import CheckpointError
from ptq.model import Experts, FileNames, unfolded

_PLAIN = ("weight", "bias")


@dataclass(frozen=True)
class ForeignFiles:
    """What a directory holds.

    Args:
        shards: the tensors of each file, by their names in the unfolded model. Layers that the
            model has as one and the files as several have the names of the several.
        in_file: what the files call a layer, by that name.
        parts: of a layer that the files have as several, those, from its first row on.
        usual: further names of parts, which ``quantization_config`` may have.
    """

    root: Path
    shards: Mapping[Path, Mapping[str, Stored]]
    in_file: Mapping[str, str]
    parts: Mapping[str, tuple[str, ...]]
    usual: Mapping[str, str]

    def parts_of(self, name: str) -> tuple[str, ...]:
        """What the files have a layer as: itself, or its parts."""
        return self.parts.get(name, (name,))

    def called(self, part: str) -> tuple[str, ...]:
        """Every name that ``quantization_config`` may have for what :meth:`parts_of` gives."""
        names = (part, self.in_file.get(part, part), self.usual.get(part, part))
        return tuple(dict.fromkeys(names))


@contextmanager
def foreign_files(root: Path, model: nn.Module) -> Iterator[ForeignFiles]:
    """The files of a directory; within it, what they hold as linear layers is that in the model.

    Raises:
        CheckpointError: a file is missing or damaged, or two tensors are the same one of the model.
    """
    names = FileNames(model)
    shards: dict[Path, dict[str, Stored]] = {}
    in_file: dict[str, str] = {}
    kept = model.state_dict().keys()
    for path, header in find_shards(root).items():
        shards[path] = {}
        for key, stored in header.items():
            found = _in_model(names, key, kept, in_file)
            if any(found in other for other in shards.values()):
                raise CheckpointError(f"{root}: two tensors of the files are {found} of the model")
            shards[path][found] = stored
    keys = {key for header in shards.values() for key in header}
    with unfolded(model, _apart(model, keys)):
        owners = {key.rpartition(".")[0] for key in keys}
        parts: dict[str, tuple[str, ...]] = {}
        usual: dict[str, str] = {}
        for name in _layers_of_experts(model):
            apart = names.are_apart(name.rpartition(".")[0].rpartition(".")[0])
            own, other = (
                tuple(names.layer_in_model(part) for part in found(name))
                for found in (names.parts if apart else names.usual_parts, names.usual_parts)
            )
            parts[name] = other if owners.intersection(other) else own
            usual.update(zip(parts[name], other, strict=True))
        yield ForeignFiles(root, shards, in_file, parts, usual)


def _in_model(names: FileNames, key: str, kept: Collection[str], in_file: dict[str, str]) -> str:
    """A tensor's name in the model; its layer's is noted."""
    owner, _, leaf = key.rpartition(".")
    layer = names.layer_in_model(owner)
    in_file.setdefault(layer, owner)
    known = (name for name in (names.in_model(key), key) if name in kept)
    return next(known, f"{layer}.{leaf}" if owner else key)


def _apart(model: nn.Module, keys: set[str]) -> set[str]:
    """The layers that the files have codes of, and all those of experts that they have apart."""
    found = set()
    for key in keys:
        owner, _, leaf = key.rpartition(".")
        if leaf not in _PLAIN or _is_inside(model, owner):
            found.add(owner)
    modules = dict(model.named_modules())
    return {owner for owner in found if owner not in modules or not _is_fused(modules[owner])}


def _is_inside(model: nn.Module, name: str) -> bool:
    """Whether it is the name of a layer that the model as it is does not have."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return True
    return False


def _is_fused(module: nn.Module) -> bool:
    return any(p.dim() == 3 for p in module.parameters(recurse=False))


def _layers_of_experts(model: nn.Module) -> list[str]:
    return [
        f"{owner}.{name}"
        for owner, module in model.named_modules()
        if isinstance(module, Experts)
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear
    ]
