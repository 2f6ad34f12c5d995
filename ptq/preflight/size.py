"""The bytes that a checkpoint's weights will take on the disk, their headers included."""

import torch
from torch import Tensor, nn

from ptq.checkpoint import shard_bytes
from ptq.model import cast_parameters, replace_modules, unfolded
from ptq.modules import QuantEmbedding, QuantLinear
from ptq.planning import Plan


def checkpoint_bytes(empty: nn.Module, plan: Plan, dtype: torch.dtype, limit: int) -> int:
    """Bytes of all ``.safetensors`` files together.

    Args:
        empty: the float model on the meta device; it becomes the quantized one.
        plan: made for it.
        dtype: of what stays float.
        limit: tensor bytes in one file at most.
    """
    with unfolded(empty, plan.schemes):
        replace_modules(empty, _empty_layers(empty, plan))
    cast_parameters(empty, dtype)
    return sum(shard_bytes(_distinct(empty), limit))


def _empty_layers(empty: nn.Module, plan: Plan) -> dict[str, QuantLinear | QuantEmbedding]:
    layers: dict[str, QuantLinear | QuantEmbedding] = {}
    for name, scheme in plan.embeddings.items():
        table = empty.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        rows, columns = table.num_embeddings, table.embedding_dim
        layers[name] = QuantEmbedding.on_meta(rows, columns, scheme, table.weight.dtype)
    for name, scheme in plan.schemes.items():
        linear = empty.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        bias = None if linear.bias is None else linear.bias.dtype
        layers[name] = QuantLinear.on_meta(linear.in_features, linear.out_features, scheme, bias)
    for name, owner in plan.sharing.items():  # a head over the embedding's codes
        head = empty.get_submodule(name)
        assert isinstance(head, nn.Linear)
        layers[name] = QuantLinear(
            layers[owner].quantized_weight, plan.embeddings[owner], head.bias
        )
    return layers


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds, those that are shared once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found
