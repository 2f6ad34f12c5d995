"""``quantization_config`` in config.json: which layers are quantized, and how.

The manifest says more; this is what a reader needs that has config.json and the weights only, such
as transformers, which downloads nothing else.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ptq.checkpoint.manifest import FORMAT_VERSION, Entry
from ptq.config import KVCacheConfig, Scheme
from ptq.errors import CheckpointError

_SECTION = "quantization_config"


class Group(Entry):
    """Layers, by their module names, that have one scheme."""

    scheme: Scheme
    layers: tuple[str, ...]


class Description(Entry):
    """The section.

    Args:
        aliases: as in the manifest: further names of stored tensors, each to the stored name.
        kv_cache: how ``model.generate`` keeps keys and values; written only where not in float.
    """

    quant_method: Literal["ptq"]
    format_version: int
    groups: tuple[Group, ...]
    aliases: dict[str, str]
    kv_cache: KVCacheConfig | None = None

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each layer."""
        return {layer: group.scheme for group in self.groups for layer in group.layers}


def describe(
    schemes: Mapping[str, Scheme],
    aliases: Mapping[str, str],
    kv_cache: KVCacheConfig | None = None,
) -> dict[str, Any]:
    """The section for layers of these schemes, and this cache, as JSON values."""
    groups: list[tuple[Scheme, list[str]]] = []
    for layer, scheme in schemes.items():
        same = next((names for known, names in groups if known == scheme), None)
        if same is None:
            groups.append((scheme, [layer]))
        else:
            same.append(layer)
    return Description(
        quant_method="ptq",
        format_version=FORMAT_VERSION,
        groups=tuple(Group(scheme=s, layers=tuple(names)) for s, names in groups),
        aliases=dict(aliases),
        kv_cache=kv_cache,
    ).model_dump(mode="json", exclude={"kv_cache"} if kv_cache is None else None)


def read_cache(section: Mapping[str, Any], path: Path) -> KVCacheConfig | None:
    """What the section of the config.json at ``path`` says of the cache, None for float.

    Raises:
        CheckpointError: it says something, and the section is damaged.
    """
    return read_description(section, path).kv_cache if "kv_cache" in section else None


def read_description(section: Mapping[str, Any], path: Path) -> Description:
    """The section of the config.json at ``path``, checked.

    Raises:
        CheckpointError: it is of another format version, damaged, names a layer twice, or was
            written before ptq named the layers there.
    """
    where = f"{path}: {_SECTION}"
    version = section.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}.format_version is {version!r}, this ptq reads {FORMAT_VERSION}; "
            "upgrade: pip install -U ptq-toolkit"
        )
    if "groups" not in section:
        raise CheckpointError(
            f"{where}.groups is missing: an early ptq wrote the checkpoint; write it again: "
            f"ptq.save(ptq.load({str(path.parent)!r}), 'NEW')"
        )
    try:
        description = Description.model_validate(dict(section))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = " ".join(first["msg"].split())
        raise CheckpointError(
            f"{where}.{key}: {reason}; the file is damaged, copy it again"
        ) from None
    named = [layer for group in description.groups for layer in group.layers]
    twice = next((layer for layer, count in Counter(named).items() if count > 1), None)
    if twice is not None or not named:
        problem = "no layer is named" if twice is None else f"layer {twice} is named twice"
        raise CheckpointError(f"{where}.groups: {problem}; the file is damaged, copy it again")
    for alias, stored in description.aliases.items():
        if stored in description.aliases:
            raise CheckpointError(
                f"{where}.aliases: {alias} is said to be {stored}, which is not stored; "
                "the file is damaged, copy it again"
            )
    return description
