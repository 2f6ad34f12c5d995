"""Act-order: groups of inputs that are not neighbours, as GPTQ makes them with ``desc_act``.

Files have the codes in the order of the inputs and, as ``g_idx``, the group of each input. In a
QuantizedWeight the groups are neighbours, and ``input_order`` says which input each column is for.
"""

import torch
from torch import Tensor

from ptq.core import pack, unpack
from ptq.errors import CheckpointError
from ptq.formats import IntFormat


def order_of(g_idx: Tensor, size: int) -> Tensor | None:
    """The inputs, int32 [K], those of the first group first; None if they are in that order.

    Args:
        g_idx: the group of each input, [K]; -1 everywhere: in order.
        size: inputs of each group.

    Raises:
        CheckpointError: it does not give every group so many inputs.
    """
    if bool((g_idx == -1).all()):
        return None
    wanted = torch.arange(len(g_idx), device=g_idx.device) // size
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order].long(), wanted):
        raise CheckpointError(
            f"g_idx does not give each of {len(g_idx) // size} groups {size} inputs; the file is "
            "damaged, or quantization_config.group_size is another"
        )
    return None if torch.equal(g_idx.long(), wanted) else order.to(torch.int32)


def groups_of_inputs(order: Tensor | None, columns: int, size: int) -> Tensor:
    """``g_idx``, int32 [K]."""
    device = None if order is None else order.device
    groups = (torch.arange(columns, device=device) // size).to(torch.int32)
    return groups if order is None else groups[torch.argsort(order)]


def in_groups(packed: Tensor, columns: int, fmt: IntFormat, order: Tensor | None) -> Tensor:
    """Packed codes [N, K] in the order of the inputs, with the groups as neighbours."""
    return packed if order is None else _permuted(packed, columns, fmt, order)


def in_input_order(packed: Tensor, columns: int, fmt: IntFormat, order: Tensor | None) -> Tensor:
    """The inverse of :func:`in_groups`."""
    return packed if order is None else _permuted(packed, columns, fmt, torch.argsort(order))


def _permuted(packed: Tensor, columns: int, fmt: IntFormat, order: Tensor) -> Tensor:
    return pack(unpack(packed, columns, fmt)[:, order.long()].contiguous(), fmt)
