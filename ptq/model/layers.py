"""Reading a model's module tree: its linear layers, its output head, what is shared."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ptq.core import is_finite
from ptq.errors import ModelError
from ptq.model.unfold import is_foldable, stand_ins


@dataclass(frozen=True)
class TensorInfo:
    """One parameter or persistent buffer of a module.

    Args:
        float32_in: dtypes of a model in which transformers keeps this tensor in float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    float32_in: tuple[torch.dtype, ...] = ()


@dataclass(frozen=True)
class LayerInfo:
    """One module that owns parameters or persistent buffers.

    Args:
        name: its (first) name in the model.
        kind: class name; of a layer within a module of another kind, the name of that one's.
        shape: of its weight, [] if it has none.
        parameters: elements that it owns; those it shares with an earlier module do not count.
        tensors: the parameters and persistent buffers that it owns.
        is_head: the model's output embedding.
        is_embedding: a plain ``nn.Embedding``: the model's token embedding, or any one of a
            model that does not say which that is.
        tied_to: name of the module that owns its weight, if another one does.
        obstacle: why it cannot be quantized (None for a replaceable linear layer).
        dtype: of its weight; float32 if it has none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    tensors: tuple[TensorInfo, ...]
    is_head: bool
    is_embedding: bool
    tied_to: str | None
    obstacle: str | None
    dtype: torch.dtype

    @property
    def is_linear(self) -> bool:
        """A plain ``nn.Linear``, which can be replaced."""
        return self.obstacle is None


def read_layers(model: nn.Module) -> list[LayerInfo]:
    """Every module that owns tensors, in order; works on the meta device.

    In place of what can be unfolded (:mod:`ptq.model.unfold`), the linear layers that it becomes.
    """
    head, embedding = output_head(model), token_embedding(model)
    owners: dict[int, str] = {}
    infos = []
    for name, module, kind in _unfolded_modules(model):
        tensors: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
        tensors |= {
            n: b
            for n, b in module.named_buffers(recurse=False)
            if n not in module._non_persistent_buffers_set
        }
        if tensors:
            kept = {n: _float32_in(model, f"{name}.{n}") for n in tensors}
            ends = (module is head, _is_embedding(module, embedding))
            infos.append(_info(name, module, kind, tensors, kept, owners, *ends))
        for tensor in tensors.values():
            owners.setdefault(id(tensor), name)
    return _both_ends(infos)


def _unfolded_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every module with its name and kind, as they are in the unfolded model."""
    linears = stand_ins(model)
    for name, module in model.named_modules():
        inside = linears.get(name, nn.Module()).named_modules(prefix=name)
        for own, part in inside if name in linears else ((name, module),):
            yield own, part, type(module).__name__


def _info(
    name: str,
    module: nn.Module,
    kind: str,
    tensors: dict[str, torch.Tensor],
    kept: dict[str, tuple[torch.dtype, ...]],
    owners: dict[int, str],
    is_head: bool,
    is_embedding: bool,
) -> LayerInfo:
    weight = tensors.get("weight")
    own = {n: t for n, t in tensors.items() if id(t) not in owners}
    return LayerInfo(
        name=name,
        kind=kind,
        shape=() if weight is None else tuple(weight.shape),
        parameters=sum(t.numel() for t in own.values() if isinstance(t, nn.Parameter)),
        tensors=tuple(
            TensorInfo(n, tuple(t.shape), t.dtype, isinstance(t, nn.Parameter), kept[n])
            for n, t in own.items()
        ),
        is_head=is_head,
        is_embedding=is_embedding,
        tied_to=None if weight is None else owners.get(id(weight)),
        obstacle=_obstacle(module),
        dtype=torch.float32 if weight is None else weight.dtype,
    )


def _both_ends(infos: list[LayerInfo]) -> list[LayerInfo]:
    """A linear layer whose weight a later module shares is tied as well."""
    sharers = {i.tied_to: i.name for i in reversed(infos) if i.tied_to is not None}
    return [
        replace(i, tied_to=sharers[i.name])
        if i.is_linear and i.tied_to is None and i.name in sharers
        else i
        for i in infos
    ]


def _obstacle(module: nn.Module) -> str | None:
    if is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if isinstance(module, nn.Linear) and "weight" not in module._parameters:
        return "its weight is computed (weight_norm, spectral_norm, pruning); remove that first"
    if "forward" in vars(module):
        return "its forward was replaced (offloading hooks do that); take the hook off first"
    if type(module) is nn.Linear:
        return None
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} is a subclass of nn.Linear with behaviour of its own"
    if is_foldable(module):
        return "its weight is shared with another module"
    kind = type(module).__name__
    if kind.endswith("Experts") and any(p.dim() == 3 for p in module.parameters(recurse=False)):
        return f"{kind} holds experts in a layout that ptq does not know"
    return f"{kind} is not a linear layer"


def _is_embedding(module: nn.Module, embedding: nn.Module | None) -> bool:
    return (
        type(module) is nn.Embedding
        and module.max_norm is None  # renormalizes its rows as they are looked up
        and "forward" not in vars(module)
        and (embedding is None or module is embedding)
    )


def token_embedding(model: nn.Module) -> nn.Module | None:
    """Of a model that says which that is."""
    return _end(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """Of a model that says which that is."""
    return _end(model, "get_output_embeddings")


def _end(model: nn.Module, name: str) -> nn.Module | None:
    getter = getattr(model, name, None)
    try:
        module = getter() if callable(getter) else None
    except NotImplementedError:  # transformers' models of images and sound
        return None
    return module if isinstance(module, nn.Module) else None


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ModelError: names the first tensor with NaN or Inf, or without values (meta device).
    """
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ModelError(
                f"tensor {name} has no values (it is on the meta device, or offloaded); "
                "load the whole model on cpu or cuda"
            )
        check_values(name, tensor)


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor with values that are not numbers.

    Raises:
        ModelError: NaN or Inf; the tensor is named.
    """
    if tensor.is_floating_point() and not is_finite(tensor):
        bad = int((~tensor.isfinite()).sum())
        raise ModelError(
            f"tensor {name} has {bad} NaN or Inf of {tensor.numel()} values; "
            "the model is damaged, load it from a good source"
        )


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the float parameters, in place; buffers (rotary frequencies, scales) stay as they are.

    ``model.to(dtype)`` would round the rotary frequencies, which ``from_pretrained`` does not.
    What transformers keeps in float32 in a model of this dtype becomes float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            kept = dtype in _float32_in(model, name)
            parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    config = getattr(model, "config", None)
    if config is not None:
        config.dtype = dtype


def _float32_in(model: nn.Module, name: str) -> tuple[torch.dtype, ...]:
    """dtypes of a model in which transformers keeps the tensor ``name`` in float32."""
    halves = {
        "_keep_in_fp32_modules": (torch.float16,),
        "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16),
    }
    return tuple(
        dtype
        for attribute, dtypes in halves.items()
        for part in getattr(model, attribute, None) or ()
        if re.search(rf"(^|\.){re.escape(part)}($|\.)", name)
        for dtype in dtypes
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block; afterwards every module is in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
