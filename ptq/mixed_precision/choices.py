"""What can be chosen: groups of layers that get one scheme, and what each option costs."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ptq.checkpoint.vllm import fused_layers
from ptq.config import QuantizationConfig, Scheme, preset
from ptq.errors import ConfigError
from ptq.model import LayerInfo, read_layers
from ptq.planning import LayerPlan, Plan, plan, quantized_bytes
from ptq.recipe import Recipe, make_recipe

SIZES = ("w3a16-g64-asym", "w4a16-g64-asym", "w4a16-g32-asym", "w6a16-g64-asym", "w8a16")
"""Default candidates where activations stay float."""
INTEGERS = ("w4a8-g64-asym", "w8a8", "w8a16")
"""Default candidates where the configuration's scheme quantizes activations."""
ENDS = ("float", "w8a16")
"""Default candidates for the embedding and the output head."""
FITS_ALL = preset("w8a16")  # one scale a row


@dataclass(frozen=True)
class Option:
    """One scheme for a group of layers.

    Args:
        scheme: None for float.
        bytes: of the layers' tensors in the checkpoint.
    """

    scheme: Scheme | None
    bytes: int

    @property
    def name(self) -> str:
        return "float" if self.scheme is None else str(self.scheme)


@dataclass(frozen=True)
class Choice:
    """Layers that get one scheme, and the options; the embedding's are of ``embeddings``.

    Args:
        layers: in the model's order.
        weights: number of them.
        is_embedding: the first is the token embedding (the second an output head tied to it).
        is_head: it is the output head.
    """

    layers: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]
    is_embedding: bool = False
    is_head: bool = False

    @property
    def is_end(self) -> bool:
        return self.is_embedding or self.is_head


@dataclass(frozen=True)
class Space:
    """All choices, and what is fixed.

    Args:
        fixed_bytes: of the tensors that no choice changes.
        fixed: layers that are quantized as the configuration's own rules say.
    """

    choices: tuple[Choice, ...]
    fixed_bytes: int
    fixed: Mapping[str, Scheme]

    @property
    def weights(self) -> int:
        return sum(choice.weights for choice in self.choices)


def default_schemes(scheme: Scheme) -> tuple[str, ...]:
    """Candidates for a configuration with this scheme."""
    return SIZES if scheme.activations is None else INTEGERS


def make_space(
    model: nn.Module,
    config: QuantizationConfig,
    schemes: Sequence[Scheme | None],
    ends: Sequence[Scheme | None] = (),
    *,
    fuse: bool = True,
    dtype: torch.dtype | None = None,
) -> Space:
    """What can be chosen for each layer of a model, which may be on the meta device.

    Layers that a rule of the configuration names keep what it says; so do embeddings and output
    heads unless ``ends`` has candidates for them. A candidate whose groups do not divide a layer
    is no option for it. The configuration's own scheme is not looked at.

    Args:
        schemes: candidates; None is float.
        ends: candidates for the token embedding and the output head.
        fuse: layers that engines make one matrix of (q, k and v; gate and up) get one scheme.
        dtype: of what stays float, in the checkpoint.

    Raises:
        ConfigError: nothing is left to choose.
    """
    made = plan(model, config.model_copy(update={"scheme": FITS_ALL}), dtype=dtype)
    recipe = make_recipe(config.recipe, FITS_ALL)
    infos = {info.name: info for info in read_layers(model)}
    free = [layer for layer in made.layers if _is_free(layer, infos[layer.name], ends)]
    names = {layer.name for layer in free}
    by_name = {layer.name: layer for layer in made.layers}
    choices = []
    for group in _groups(model, free, infos, config, fuse):
        members = [by_name[name] for name in group]
        first = infos[group[0]]
        wanted = ends if first.is_embedding or first.is_head else schemes
        options = tuple(_options(members, infos, wanted, recipe, dtype))
        if not options:
            raise ConfigError(
                f"layer {group[0]} {list(first.shape)}: none of the candidates "
                f"{', '.join('float' if s is None else str(s) for s in wanted)} fits it; add float"
            )
        weights = sum(math.prod(layer.shape) for layer in _owners(members))
        choices.append(Choice(group, weights, options, first.is_embedding, first.is_head))
    if not choices:
        raise ConfigError(
            "there is nothing to choose: the configuration's rules name every layer; remove some"
        )
    fixed = [layer for layer in made.layers if layer.name not in names]
    return Space(tuple(choices), sum(x.bytes_after for x in fixed), _quantized(made, fixed))


def _is_free(layer: LayerPlan, info: LayerInfo, ends: Sequence[Scheme | None]) -> bool:
    if layer.decided_by.startswith("rules."):
        return False
    if info.is_embedding or info.is_head:
        return bool(ends) and (info.is_linear or info.is_embedding)
    return info.is_linear and layer.scheme is not None


def _groups(
    model: nn.Module,
    free: Iterable[LayerPlan],
    infos: Mapping[str, LayerInfo],
    config: QuantizationConfig,
    fuse: bool,
) -> Iterator[tuple[str, ...]]:
    """Names of layers that have one scheme, each layer once, in the model's order."""
    names = [layer.name for layer in free]
    together = [tuple(group) for group in fused_layers(model)] if fuse else []
    if config.tied_embeddings == "keep":
        heads = [n for n in names if infos[n].is_linear and infos[n].tied_to is not None]
        together += [(infos[head].tied_to or "", head) for head in heads]
    owner = {name: group for group in together for name in group}
    seen: set[str] = set()
    for name in names:
        if name not in seen:
            group = tuple(n for n in owner.get(name, (name,)) if n in names)
            seen.update(group)
            yield group


def _options(
    members: Sequence[LayerPlan],
    infos: Mapping[str, LayerInfo],
    schemes: Iterable[Scheme | None],
    recipe: Recipe,
    dtype: torch.dtype | None,
) -> Iterator[Option]:
    for scheme in dict.fromkeys(schemes):
        if scheme is None:
            yield Option(None, sum(layer.bytes_before for layer in members))
        elif all(_fits(scheme, layer.shape) for layer in members):
            owners = [infos[layer.name] for layer in _owners(members)]
            looked_up = owners[0].is_embedding
            written = scheme if looked_up else recipe.decided(scheme)
            yield Option(scheme, sum(quantized_bytes(info, written, dtype) for info in owners))


def _owners(members: Sequence[LayerPlan]) -> Sequence[LayerPlan]:
    """Those with a weight of their own: a head in one group with the embedding is tied to it."""
    return members[:1] if members[0].kind == "Embedding" else members


def _fits(scheme: Scheme, shape: Collection[int]) -> bool:
    rows, columns = shape
    try:
        scheme.weights.granularity_value.scale_shape((rows, columns))
    except ConfigError:
        return False
    return True


def _quantized(made: Plan, layers: Iterable[LayerPlan]) -> dict[str, Scheme]:
    names = {layer.name for layer in layers}
    return {name: scheme for name, scheme in made.schemes.items() if name in names}
