"""Reading the native checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptq.checkpoint.ahead import Ahead
from ptq.checkpoint.atomic import recover
from ptq.checkpoint.contents import check_file, check_tensor, checked_header
from ptq.checkpoint.declare import declare_quantized
from ptq.checkpoint.description import read_cache
from ptq.checkpoint.foreign import quantization_of
from ptq.checkpoint.from_config import generation_config, load_config, model_of
from ptq.checkpoint.manifest import CONFIG, GENERATION_CONFIG, INDEX, Manifest
from ptq.checkpoint.manifest_read import check_index, read_manifest
from ptq.checkpoint.shard import Stored, read_tensor
from ptq.checkpoint.slots import check_fit, dtype_named, empty_layers, slots
from ptq.checkpoint.values import check_computed_size, check_layers
from ptq.errors import CheckpointError, UnsupportedError
from ptq.kv_cache import attach_cache, hold_empty_scales
from ptq.model import fill_computed_buffers, replace_modules, unfolded
from ptq.modules import share_inputs, tie_shared


def load(
    directory: str | Path,
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> nn.Module:
    """:func:`ptq.checkpoint.load` of what :func:`ptq.save` wrote."""
    root = Path(directory).expanduser()
    device = usable_device(device)
    manifest = read_manifest(root)
    check_index(root, manifest)
    for name in (CONFIG, GENERATION_CONFIG, INDEX):
        if verify and name in manifest.files:
            check_file(root, name, manifest)
    headers = {shard: checked_header(root, shard, manifest) for shard in manifest.shards}
    cache = read_cache(quantization_of(root), root / CONFIG)
    files = {root / shard: header for shard, header in headers.items()}

    def read(descriptor: int, path: Path, key: str, stored: Stored) -> Tensor:
        tensor = read_tensor(descriptor, path, key, stored)
        if verify:
            check_tensor(root, key, tensor, manifest)
        return tensor.to(device)

    with Ahead(read, files) as ahead:
        model = _empty_model(root, manifest) if model is None else model
        if isinstance(model, PreTrainedModel) and cache is not None and cache.static:
            stored = {k: (dtype_named(e.dtype), e.shape) for k, e in manifest.tensors.items()}
            hold_empty_scales(model, model.config, cache, stored, root)
        with unfolded(model, manifest.layers):
            layers = empty_layers(model, manifest.layers)
            check_fit(slots(model, layers), manifest)
            check_computed_size(model, root, manifest.total_tensor_bytes)
            tensors = ahead.results()
            replace_modules(model, layers)
    share_inputs(model)
    assign(model, tensors, manifest.aliases)
    check_layers(layers)
    tie_shared(model)
    fill_computed_buffers(model, device)
    if isinstance(model, PreTrainedModel) and GENERATION_CONFIG in manifest.files:
        model.generation_config = generation_config(root)
    if isinstance(model, PreTrainedModel) and cache is not None:
        attach_cache(model, cache)
    declare_quantized(model)
    return model.to(device).eval()


def recovered(root: Path) -> Path:
    """The directory; put back first if its writer was killed while replacing it.

    Raises:
        CheckpointError: it cannot be put back.
    """
    if not root.exists():
        try:
            recover(root.absolute())
        except OSError as error:
            raise CheckpointError(
                f"the writer of {root} was killed while replacing it, and the old checkpoint "
                f"beside it cannot be put back: {error}; rename it by hand"
            ) from None
    return root


def usable_device(device: str | torch.device) -> torch.device:
    """The device, which is there.

    Raises:
        CheckpointError: it is not.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"device {str(device)!r} cannot be used: {reason}") from None


def _empty_model(root: Path, manifest: Manifest) -> PreTrainedModel:
    if CONFIG not in manifest.files:
        raise UnsupportedError(
            f"{root} holds a {manifest.model_class}, which is not a transformers model; "
            "build it and pass it: ptq.load(directory, model=...)"
        )
    config = load_config(root)
    name = manifest.model_class.rpartition(".")[2]
    builtin = manifest.model_class.startswith("transformers.")
    if not builtin or config.architectures != [name]:
        config.architectures = None
    return model_of(root, config, manifest.model_class, len(manifest.tensors))


def assign(model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Put the tensors in their slots; the names of one tensor get the same Parameter."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared: dict[str, nn.Parameter] = {}
    values: dict[str, Tensor] = {}
    for key, source in {**{key: key for key in tensors}, **aliases}.items():
        value = tensors[source]
        if key in parameters:
            value = shared.setdefault(source, nn.Parameter(value, requires_grad=False))
        values[key] = value
    model.load_state_dict(values, assign=True)
