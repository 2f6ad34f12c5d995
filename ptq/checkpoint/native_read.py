"""Reading the native checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from ptq.checkpoint.atomic import recover
from ptq.checkpoint.contents import check_file, check_tensor, checked_header
from ptq.checkpoint.declare import declare_quantized
from ptq.checkpoint.description import read_cache
from ptq.checkpoint.foreign import quantization_of
from ptq.checkpoint.manifest import CONFIG, GENERATION_CONFIG, INDEX, Manifest
from ptq.checkpoint.manifest_read import check_index, read_manifest
from ptq.checkpoint.paths import inside
from ptq.checkpoint.shard import Stored, read_tensors
from ptq.checkpoint.slots import check_fit, empty_layers, slots
from ptq.errors import CheckpointError, UnsupportedError
from ptq.kv_cache import attach_cache
from ptq.model import fill_computed_buffers, replace_modules, skeleton, unfolded
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
    model = _empty_model(root, manifest) if model is None else model
    with unfolded(model, manifest.layers):
        layers = empty_layers(model, manifest.layers)
        check_fit(slots(model, layers), manifest)
        tensors = _read(root, manifest, headers, device, verify)
        replace_modules(model, layers)
    share_inputs(model)
    assign(model, tensors, manifest.aliases)
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
    builtin = manifest.model_class.startswith("transformers.") and hasattr(transformers, name)
    if not builtin or config.architectures != [name]:
        raise UnsupportedError(
            f"{root} holds a {manifest.model_class}, which transformers "
            f"{transformers.__version__} does not have; ptq does not run code that comes with a "
            "model (trust_remote_code): build it and pass it: ptq.load(directory, model=...)"
        )
    return skeleton(config)


def load_config(root: Path) -> PretrainedConfig:
    """The transformers config of a directory, without what it says about quantization.

    Raises:
        CheckpointError: it cannot be used.
    """
    inside(root, CONFIG)
    try:
        config = AutoConfig.from_pretrained(root)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{root / CONFIG} cannot be used: {_first_line(error)}") from None
    assert isinstance(config, PretrainedConfig)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _read(
    root: Path,
    manifest: Manifest,
    headers: Mapping[str, Mapping[str, Stored]],
    device: torch.device,
    verify: bool,
) -> dict[str, Tensor]:
    tensors = {}
    for shard, header in headers.items():
        for key, tensor in read_tensors(root / shard, header):
            if verify:
                check_tensor(root, key, tensor, manifest)
            tensors[key] = tensor.to(device)
    return tensors


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


def generation_config(root: Path) -> GenerationConfig:
    """The generation config of a directory, which has one.

    Raises:
        CheckpointError: it cannot be used.
    """
    inside(root, GENERATION_CONFIG)
    try:
        return GenerationConfig.from_pretrained(root)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{root / GENERATION_CONFIG} cannot be used: {_first_line(error)}"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
