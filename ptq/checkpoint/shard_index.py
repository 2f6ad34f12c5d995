"""Which safetensors files a directory of transformers' kind has."""

from pathlib import Path

from ptq.checkpoint.json_file import read_json
from ptq.checkpoint.manifest import INDEX, WEIGHTS
from ptq.checkpoint.paths import inside
from ptq.checkpoint.shard import Stored, read_header
from ptq.errors import CheckpointError


def read_weight_map(root: Path) -> dict[str, str]:
    """The file of each tensor, as the index of a sharded checkpoint gives it; all are inside.

    Raises:
        CheckpointError: it is missing, damaged or outside of the directory.
    """
    weight_map = read_json(inside(root, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{root / INDEX} is damaged: it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str):
            inside(root, name)
    for name in set(weight_map.values()):
        inside(root, name)
    return weight_map


def find_shards(root: Path) -> dict[Path, dict[str, Stored]]:
    """The tensors of each file: those of the index, or of the one file where there is none.

    Raises:
        CheckpointError: a file is missing, damaged or outside of the directory, or holds other
            tensors than the index says.
    """
    if not (root / INDEX).is_file():
        path = inside(root, WEIGHTS)
        return {path: read_header(path)}
    weight_map = read_weight_map(root)
    names = dict.fromkeys(weight_map.values())
    shards = {name: read_header(inside(root, name)) for name in names}
    held = {key: name for name, header in shards.items() for key in header}
    for key in (*weight_map, *held):
        if weight_map.get(key) != held.get(key):
            raise CheckpointError(
                f"{root / INDEX}: tensor {key} is said to be in {weight_map.get(key)}, and is in "
                f"{held.get(key)}; copy the checkpoint again"
            )
    if sum(map(len, shards.values())) != len(held):
        raise CheckpointError(f"{root}: a tensor is in two files; copy the checkpoint again")
    return {root / name: header for name, header in shards.items()}
