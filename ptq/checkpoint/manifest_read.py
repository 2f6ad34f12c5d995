"""Reading a manifest, and refusing what is not one."""

from pathlib import Path

from ptq.checkpoint.embedded import embedded_manifest
from ptq.checkpoint.foreign import READ, REMEDIES, method_of, quantization_of
from ptq.checkpoint.json_file import read_json
from ptq.checkpoint.manifest import CONFIG, INDEX, MANIFEST, Manifest
from ptq.checkpoint.manifest_parse import parsed_manifest
from ptq.checkpoint.paths import inside
from ptq.checkpoint.shard_index import read_weight_map
from ptq.errors import CheckpointError


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a checkpoint; its hash, its version and its file names are checked.

    One that transformers' ``save_pretrained`` wrote has it in the headers of its weight files.

    Raises:
        CheckpointError: the directory holds no ptq checkpoint or one of a newer format, or the
            manifest is damaged, edited, or names a file outside of the directory.
    """
    root = Path(directory)
    manifest = embedded_manifest(root)
    if manifest is None:
        if not (root / MANIFEST).is_file():
            raise CheckpointError(_what_it_is(root))
        manifest = parsed_manifest(read_json(inside(root, MANIFEST)), root / MANIFEST)
    _check_names(root, manifest)
    return manifest


def _check_names(root: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        inside(root, shard)
    for name in manifest.files:
        inside(root, name, nested=True)
    for alias, key in manifest.aliases.items():
        if key not in manifest.tensors:
            raise CheckpointError(
                f"{root / MANIFEST}: tensor {alias} is said to be {key}, which is not stored"
            )


def check_index(root: Path, manifest: Manifest) -> None:
    """Check that the index of a sharded checkpoint says what the manifest says.

    Raises:
        CheckpointError: the index is missing or damaged, names a file outside of the directory,
            or has a tensor elsewhere than the manifest.
    """
    if INDEX not in manifest.files:
        return
    weight_map = read_weight_map(root)
    for key in [*manifest.tensors, *weight_map]:
        entry = manifest.tensors.get(key)
        wanted = None if entry is None else entry.shard
        if weight_map.get(key) != wanted:
            raise CheckpointError(
                f"{root / INDEX}: tensor {key} is in {weight_map.get(key)}, "
                f"but {MANIFEST} says {wanted}; copy the index again"
            )


def _what_it_is(root: Path) -> str:
    """Why a directory without manifest cannot be loaded."""
    if not root.exists():
        return f"no checkpoint at {root.absolute()}"
    if not root.is_dir():
        return f"{root} is a file; give the directory that ptq.save wrote"
    message = f"{root} is not a ptq checkpoint: it has no {MANIFEST}"
    if not (root / CONFIG).is_file():
        return message
    name = method_of(quantization_of(root))
    if name == "ptq":
        return f"{message}, though {CONFIG} names ptq; copy the whole checkpoint again"
    if name in READ:
        return (
            f"{message}; it is in the {name!r} format, which ptq.load reads; to make one of it: "
            "scripts/convert_checkpoint.py --format ptq"
        )
    if name is not None:
        remedy = REMEDIES.get(name, "quantize the float model that it was made from: ptq.quantize")
        return (
            f"{message}; {CONFIG} says that it is in the {name!r} format, which ptq cannot load: "
            f"{remedy}"
        )
    return f"{message}; it looks like a float model, quantize it first: ptq.quantize(...)"
