"""From a float model on the meta device to one whose layers await the tensors of a checkpoint."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.checkpoint.ahead import Ahead
from ptq.checkpoint.description import Description, read_description
from ptq.checkpoint.json_file import read_json
from ptq.checkpoint.manifest import CONFIG, INDEX
from ptq.checkpoint.values import check_layers
from ptq.config import KVCacheConfig
from ptq.errors import CheckpointError
from ptq.huggingface.contents import Contents, read_contents
from ptq.huggingface.hashes import hash_check
from ptq.huggingface.naming import as_saved, name_in
from ptq.kernels import aligned
from ptq.kv_cache import attach_cache, hold_empty_scales
from ptq.model import replace_modules, unfold, unfolded
from ptq.modules import QuantEmbedding, QuantLinear, share_inputs, tie_shared

Quantized = QuantLinear | QuantEmbedding


@dataclass(frozen=True)
class Prepared:
    """What is to be done when the tensors are in.

    Args:
        layers: the quantized modules, by their names in the model.
        exact: names of the tensors that must have the very dtype that they have in the files.
        shared: names of tensors of quantized modules that were taken out of the model, each with
            the name of the tensor that it is.
        kv_cache: how ``model.generate`` keeps keys and values, None for float.
        hashes: compares the tensors of the files with their hashes, meanwhile.
    """

    layers: Mapping[str, Quantized]
    exact: frozenset[str]
    shared: Mapping[str, str]
    kv_cache: KVCacheConfig | None
    hashes: Ahead[None]


def prepare(model: PreTrainedModel, section: Mapping[str, Any], files: Sequence[str]) -> Prepared:
    """Put the quantized layers, on the meta device, into a model that has no weights yet.

    Args:
        section: ``quantization_config`` of config.json.
        files: paths of the weight files, in one directory.

    Raises:
        CheckpointError: the section is damaged or of another model, or a tensor is missing, or not
            of its shape and dtype.
    """
    contents = read_contents(files)
    path = contents.root / CONFIG
    _check_directory(model, contents.root)
    description = read_description(section, path)
    with ExitStack() as stack:
        hashes = stack.enter_context(hash_check(contents.headers, contents.metadata))
        saved = as_saved(model)
        unfold(saved)
        with unfolded(model):
            layers = _empty_layers(model, saved, description, path)
            replace_modules(model, layers)
        share_inputs(model)
        exact = frozenset(
            f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_buffers()
        )
        exact |= _hold_scales(model, description.kv_cache, contents)
        shared = _tie(model, layers, description.aliases, path)
        _check(model, saved, contents, exact)
        hashes.begin_rest()
        stack.pop_all()  # they go on while transformers loads
    return Prepared(layers, exact, shared, description.kv_cache, hashes)


def _check_directory(model: PreTrainedModel, root: Path) -> None:
    """Whether the weights are where the model was asked for, and what JSON is there has each key
    once; transformers has believed both.

    Raises:
        CheckpointError: the index leads elsewhere, or a file is damaged.
    """
    name = model.config.name_or_path or ""
    asked = Path(os.path.abspath(name))
    if name and asked.is_dir() and not Path(os.path.abspath(root)).is_relative_to(asked):
        raise CheckpointError(
            f"{asked / INDEX} leads out of its directory, to {root}; somebody has changed the "
            "checkpoint, do not use it"
        )
    for name in (CONFIG, INDEX):
        if (root / name).is_file():
            read_json(root / name)


def finish(model: PreTrainedModel, prepared: Prepared) -> None:
    """Give the quantized layers what they share, and freeze them, once the tensors are loaded.

    Raises:
        CheckpointError: a tensor does not have the hash that its file gives, or makes no sense.
    """
    with prepared.hashes:
        prepared.hashes.results()
    for layer in prepared.layers.values():
        for name, tensor in layer.named_buffers():
            layer._buffers[name] = aligned(tensor, 64)  # else a kernel copies it and both stay
    for target, source in prepared.shared.items():
        owner, _, leaf = target.rpartition(".")
        value = _tensor(model, source)
        module = prepared.layers[owner]
        held = module._parameters if isinstance(value, nn.Parameter) else module._buffers
        held[leaf] = value  # type: ignore[assignment]
    for layer in prepared.layers.values():
        layer.requires_grad_(False)
    tie_shared(model)
    check_layers(prepared.layers)
    if prepared.kv_cache is not None:
        attach_cache(model, prepared.kv_cache)


def _hold_scales(
    model: PreTrainedModel, cache: KVCacheConfig | None, contents: Contents
) -> set[str]:
    """Empty scales of a static cache, in a model that can use them; returns their names."""
    if cache is None or not cache.static or not model.can_generate():
        return set()
    stored = {key: (found.dtype, found.shape) for key, found in contents.tensors.items()}
    return set(hold_empty_scales(model, model.config, cache, stored, contents))


def _empty_layers(
    model: PreTrainedModel, saved: PreTrainedModel, description: Description, path: Path
) -> dict[str, Quantized]:
    """An empty module for each quantized one, but for those that only the saved class has."""
    layers: dict[str, Quantized] = {}
    for saved_name, scheme in description.schemes.items():
        name = name_in(model, saved_name)
        module = None if name is None else model.get_submodule(name)
        if name is not None and type(module) is nn.Linear:
            bias = None if module.bias is None else module.bias.dtype
            size = (module.in_features, module.out_features)
            layers[name] = QuantLinear.on_meta(*size, scheme, bias)
        elif name is not None and type(module) is nn.Embedding:
            size = (module.num_embeddings, module.embedding_dim)
            layers[name] = QuantEmbedding.on_meta(*size, scheme, module.weight.dtype)
            layers[name].padding_idx = module.padding_idx
        elif module is not None or name_in(saved, saved_name) is None:
            found = "none" if module is None else f"a {type(module).__name__} there"
            raise CheckpointError(
                f"{path}: quantization_config.groups names the layer {saved_name}, but "
                f"{type(model).__name__} has {found}; config.json is of another model, copy it "
                "again from where the checkpoint was written"
            )
    return layers


def _tie(
    model: PreTrainedModel, layers: Mapping[str, Quantized], aliases: Mapping[str, str], path: Path
) -> dict[str, str]:
    """Have transformers tie what the checkpoint has once; it ties parameters only, and may not
    look at the float weight of a quantized layer, so what those share is taken out until later."""
    shared: dict[str, str] = {}
    ties = dict(model.all_tied_weights_keys)
    for alias, stored in aliases.items():
        target, source = (_tensor_name(model, name) for name in (alias, stored))
        if target is None or source is None:
            continue  # of a head that this model does not have
        _check_alike(path, (alias, _tensor(model, target)), (stored, _tensor(model, source)))
        owner, _, leaf = target.rpartition(".")
        if owner in layers:
            tensors: Any = layers[owner]._buffers
            (tensors if leaf in tensors else layers[owner]._parameters)[leaf] = None
            shared[target] = source
        else:
            ties[target] = source
    present = dict(model.named_parameters(remove_duplicate=False))
    model.all_tied_weights_keys = {
        target: source for target, source in ties.items() if target in present and source in present
    }
    return shared


def _check_alike(path: Path, alias: tuple[str, Tensor], stored: tuple[str, Tensor]) -> None:
    kinds = [(tensor.dtype, tensor.shape) for _, tensor in (alias, stored)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{path}: quantization_config.aliases says that {alias[0]} is {stored[0]}, but they "
            "differ in shape or dtype; the file is damaged, copy it again"
        )


def _tensor_name(model: PreTrainedModel, name: str) -> str | None:
    owner, _, leaf = name.rpartition(".")
    module = name_in(model, owner)
    if module is None or _tensor_or_none(model.get_submodule(module), leaf) is None:
        return None
    return f"{module}.{leaf}"


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor = _tensor_or_none(model.get_submodule(owner), leaf)
    assert tensor is not None, name
    return tensor


def _tensor_or_none(module: nn.Module, leaf: str) -> Tensor | None:
    found = module._parameters.get(leaf)
    return module._buffers.get(leaf) if found is None else found


def _check(
    model: PreTrainedModel, saved: PreTrainedModel, contents: Contents, exact: frozenset[str]
) -> None:
    """Every tensor of the model is in the files, but for what is tied, or new in this class."""
    wanted = model.state_dict()
    places = contents.places(model, wanted)
    ignored = model._keys_to_ignore_on_load_missing or ()
    tied = model.all_tied_weights_keys
    for name, tensor in wanted.items():
        if name in places:
            contents.check(name, tensor, places[name], name in exact)
        elif (
            tied.get(name) not in places
            and not any(re.search(pattern, name) for pattern in ignored)
            and name_in(saved, name.rpartition(".")[0]) is not None
        ):
            raise CheckpointError(
                f"{contents}: tensor {name}, which {type(model).__name__} needs, is missing; copy "
                "the whole checkpoint again"
            )
