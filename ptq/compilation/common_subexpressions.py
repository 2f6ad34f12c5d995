"""A pass of the compiler that computes once what a graph computes twice."""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node


class CommonSubexpressions(CustomGraphPass):
    """Replaces an operation by an earlier one with the same arguments.

    For graphs without mutation, as inductor has them before its own passes. Operations that draw
    random numbers or write to an argument stay.
    """

    def __call__(self, graph: Graph) -> None:
        seen: dict[Any, Node] = {}
        for node in list(graph.nodes):
            key = _key(node)
            if key is None:
                continue
            earlier = seen.setdefault(key, node)
            if earlier is not node:
                node.replace_all_uses_with(earlier)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """What the compiler's cache knows the pass by."""
        return get_hash_for_files((__file__,))


def _key(node: Node) -> Any:
    """What makes two operations the same; None for one that has to stay."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    key = (target, _frozen(node.args), _frozen(node.kwargs))
    try:
        hash(key)
    except TypeError:  # symbolic sizes of some versions
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return type(value), value  # 1, 1.0 and True are equal
