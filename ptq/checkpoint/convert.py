"""From one checkpoint format to another, codes as they are."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ptq.checkpoint import compressed_tensors, packed_int32
from ptq.checkpoint.atomic import is_ours
from ptq.checkpoint.card import CARD, is_own_card
from ptq.checkpoint.foreign import method_of, quantization_of
from ptq.checkpoint.load import load
from ptq.checkpoint.manifest import CONFIG, GENERATION_CONFIG, INDEX, MANIFEST
from ptq.checkpoint.native_read import recovered
from ptq.checkpoint.native_write import save
from ptq.checkpoint.paths import inside
from ptq.checkpoint.target import check_target
from ptq.checkpoint.written import Verify, check_how
from ptq.errors import CheckpointError

CONVERSIONS = ("ptq", compressed_tensors.METHOD, *packed_int32.LAYOUTS)
_MADE_ANEW = (CONFIG, GENERATION_CONFIG, INDEX, MANIFEST)
_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".gguf")
_OF_OTHERS = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ describe codes as well, which vLLM would believe."""


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    engine: compressed_tensors.Engine = "vllm",
    scales: compressed_tensors.Scales = "model",
    shard_bytes: int = 5_000_000_000,
    verify: Verify = "files",
) -> list[str]:
    """Write a checkpoint in another format; codes and zero points stay, bit for bit.

    The tokenizer and other files come along; code and weights in pickles do not. The target appears
    whole, read back and compared, or not at all; it is never overwritten.

    Args:
        to: one of :data:`CONVERSIONS`.
        engine, scales: as the writer of the format has them.
        verify: what has to be right before the target appears, as in :func:`ptq.save`.

    Returns:
        What is different from the source, in words.

    Raises:
        CheckpointError: the source cannot be read, or the target cannot be written.
        UnsupportedError: the format cannot hold a layer, or the engine not load it; it is named.
    """
    root = recovered(Path(source).expanduser())
    check_how(verify)
    check_target(target, False, 0)
    if _format_of(root) == to:
        raise CheckpointError(f"{root} is in the {to} format already; copy the directory")
    model = load(root)
    carried, left = _side_files(root)
    notes = [f"left behind: {', '.join(left)}"] if left else []
    if to == "ptq":
        save(model, target, shard_bytes=shard_bytes, carried=carried, verify=verify)
        return notes
    writer: Callable[..., list[str]] = compressed_tensors.write
    if to in packed_int32.LAYOUTS:
        writer = partial(packed_int32.write, layout=to)
    return notes + writer(
        model,
        target,
        engine=engine,
        scales=scales,
        shard_bytes=shard_bytes,
        carried=carried,
        verify=verify,
    )


def _format_of(root: Path) -> str | None:
    """The format of a directory, by the names of :data:`CONVERSIONS` if it is one of them."""
    if is_ours(root):
        return "ptq"
    section = quantization_of(root)
    return packed_int32.layout_name(section) or method_of(section)


def _side_files(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The files that a converted checkpoint gets as they are, and those that it does not get."""
    carried, left = {}, []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or name in _MADE_ANEW or path.suffix == ".safetensors":
            continue
        if name == CARD and is_own_card(path):
            continue  # of the other format
        if path.suffix in _LEFT or name in _OF_OTHERS:
            left.append(name)
        else:
            carried[name] = inside(root, name, nested=True)
    return carried, left
