"""A float model whose blocks stay in its safetensors files until each is needed."""

import io
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, dot_natural_key
from transformers.modeling_utils import LoadStateDictConfig

from ptq.errors import ModelError, UnsupportedError
from ptq.model.blocks import block_lists
from ptq.model.layers import check_values
from ptq.model.renaming import names_in_model
from ptq.model.shards import stored_dtype, tensor_files
from ptq.model.skeleton import fill_computed_buffers, skeleton
from ptq.model.source import ModelSource, load_model_config, resolve_device
from ptq.model.unfold import folded

_OUTSIDE = ""  # in place of a block's name: what belongs to no block


@dataclass(eq=False)
class StreamedModel:
    """A model whose blocks are on the meta device until :meth:`fill` gives them their weights.

    Everything else (embeddings, final norm, head, computed buffers) has its values. A block's
    float weights are freed as they are replaced by quantized layers; what stays float in a block
    stays in memory.

    Args:
        model: in eval mode.
        waiting: by name of a block that is not filled yet: its tensors' keys in the files, and
            the file of each.
        load: how transformers is to convert and cast what is in the files.
    """

    model: PreTrainedModel
    waiting: dict[str, dict[str, Path]]
    load: LoadStateDictConfig

    def fill(self, block: str) -> None:
        """Give the block of this name its weights; does nothing the second time.

        Raises:
            ModelError: a tensor is missing, has another shape than the model's, holds NaN or Inf,
                or cannot be read; it is named.
        """
        files = self.waiting.pop(block, None)
        if files is not None:
            with folded(self.model.get_submodule(block)):
                _read(self.model, files, self.load)
                _check(self.model, _inside(self.model, block))

    def fill_layer(self, layer: str) -> None:
        """Fill the block that the layer of this name is in, if it is in one."""
        self.fill(_owner(layer, self.waiting))

    def drop(self, block: str) -> None:
        """Do not fill the block of this name: its tensors come from elsewhere."""
        self.waiting.pop(block, None)

    def fill_rest(self, filled: Callable[[str], None] | None = None) -> None:
        """Fill every block that is still waiting; ``filled`` is told of each right after it."""
        for block in list(self.waiting):
            self.fill(block)
            if filled is not None:
                filled(block)


def stream_model(source: ModelSource, say: Callable[[str], None] | None = None) -> StreamedModel:
    """Open a model for streaming: only what is outside its blocks is read.

    Args:
        say: is told about tensors in the files that the model does not have.

    Raises:
        UnsupportedError: not safetensors, no blocks, or weights that blocks share.
        ModelError: not found, unreadable, or tensors are missing from the files (named).
    """
    files = tensor_files(source)
    config = load_model_config(source)
    dtype = _dtype(source, config, files)
    model = skeleton(config, dtype, source.options.trust_remote_code)
    device = resolve_device(source.options.device)
    blocks = [name for names in block_lists(model) for name in names]
    _refuse_unstreamable(model, blocks)
    mapping: list[Any] = get_model_conversion_mapping(model)
    waiting = _by_block(model, blocks, files, mapping)
    load = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": device},
        weight_mapping=mapping,
    )
    info = _read(model, waiting.pop(_OUTSIDE), load)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    _check(model, _inside(model, _OUTSIDE, blocks))
    fill_computed_buffers(model, device)
    _read_generation_config(model, source)
    model._adjust_missing_and_unexpected_keys(info)
    if info.unexpected_keys and say is not None:
        say(
            f"left out: {len(info.unexpected_keys)} tensors in the files are not in "
            f"{type(model).__name__}, among them {min(info.unexpected_keys)}; "
            "is config.json the right one?"
        )
    return StreamedModel(model, waiting, load)


def _dtype(source: ModelSource, config: PretrainedConfig, files: Mapping[str, Path]) -> torch.dtype:
    """What was asked for, else the config's, else that of the files: as ``from_pretrained``."""
    for dtype in (source.dtype, config.dtype):
        if isinstance(dtype, torch.dtype):
            return dtype
    return stored_dtype(files)


def _refuse_unstreamable(model: PreTrainedModel, blocks: list[str]) -> None:
    if not blocks:
        raise UnsupportedError(
            f"{type(model).__name__} has no list of blocks to stream; set model.stream: false"
        )
    tied = model.all_tied_weights_keys
    shared = [name for name in (*tied, *tied.values()) if _owner(name, blocks) != _OUTSIDE]
    if shared:
        raise UnsupportedError(
            f"{type(model).__name__} shares {shared[0]} with another module, so its blocks "
            "cannot be streamed one at a time; set model.stream: false"
        )


def _owner(name: str, blocks: Iterable[str]) -> str:
    """The block that a tensor or layer is in, or ``_OUTSIDE``."""
    return next((block for block in blocks if name.startswith(f"{block}.")), _OUTSIDE)


def _by_block(
    model: PreTrainedModel, blocks: list[str], files: Mapping[str, Path], mapping: list[Any]
) -> dict[str, dict[str, Path]]:
    """The keys of the files by the block whose tensors they make, as transformers names them.

    Raises:
        ModelError: no key makes some tensor of a block.
    """
    expected = model.state_dict()
    made: set[str] = set()
    divided: dict[str, dict[str, Path]] = {block: {} for block in (*blocks, _OUTSIDE)}
    for key in sorted(files, key=dot_natural_key):
        names = names_in_model(model, key, mapping, expected)
        made.update(names)
        divided[_owner(names[0], blocks)][key] = files[key]
    missing = [n for n in expected if n not in made and _owner(n, blocks) != _OUTSIDE]
    if missing:
        raise ModelError(
            f"{len(missing)} weights of the blocks are not in the model's files, "
            f"among them {missing[0]}"
        )
    return divided


def _read(model: PreTrainedModel, files: Mapping[str, Path], load: LoadStateDictConfig) -> Any:
    """Put tensors of the files into the model, converted and cast.

    Returns:
        transformers' account of what was loaded.

    Raises:
        ModelError: a file cannot be read, or a tensor does not fit.
    """
    try:
        with ExitStack() as stack, redirect_stderr(io.StringIO()):
            opened = {
                shard: stack.enter_context(safe_open(shard, framework="pt"))
                for shard in sorted(set(files.values()))
            }
            slices = {key: opened[shard].get_slice(key) for key, shard in files.items()}
            info, _ = convert_and_load_state_dict_in_model(model, slices, load, None)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        shards = ", ".join(sorted({str(shard) for shard in files.values()}))
        raise ModelError(f"reading {shards}: {error!r}; download it again") from None
    for name, found, wanted in sorted(info.mismatched_keys):
        raise ModelError(
            f"tensor {name} has shape {list(found)} in the files, {list(wanted)} in the model; "
            "is config.json the right one?"
        )
    for name, reason in sorted(info.conversion_errors.items()):
        raise ModelError(f"tensor {name} cannot be made from the files: {reason}")
    return info


def _inside(
    model: PreTrainedModel, block: str, blocks: Iterable[str] = ()
) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a block; or of no block, where it is ``_OUTSIDE``."""
    names = (block,) if block else blocks
    return [
        (name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and _owner(name, names) == block
    ]


def _check(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ModelError(
                f"{type(model).__name__}: tensor {name} is not in the model's files and would be "
                "random"
            )
        if isinstance(tensor, nn.Parameter):
            check_values(name, tensor)


def _read_generation_config(model: PreTrainedModel, source: ModelSource) -> None:
    """The files' own defaults for generation, as ``from_pretrained`` reads them."""
    read: Any = getattr(model, "adjust_generation_fn", None)
    if read is None or not model.can_generate():
        return
    read(
        None,
        False,
        False,
        source.path,
        cache_dir=None,
        force_download=False,
        local_files_only=False,
        token=None,
        revision=source.options.revision or "main",
        subfolder="",
        trust_remote_code=source.options.trust_remote_code,
        proxies=None,
    )
