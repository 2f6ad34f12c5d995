"""Finished blocks on their way into a store and back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ptq.blockwise.store import Store
from ptq.config import Scheme
from ptq.modules import buffers_of, weight_of
from ptq.refine import LayerState


@dataclass(eq=False)
class Keeper:
    """The blocks of a model that a store has.

    Args:
        kept: by name of a block, the list that it is in, and its position there.
    """

    model: nn.Module
    store: Store
    kept: dict[str, tuple[list[str], int]] = field(default_factory=dict, init=False)

    def keep(self, names: list[str], position: int, waiting: Mapping[str, LayerState]) -> None:
        """Give the store a finished block; where it streams, the block's values go.

        Args:
            waiting: its layers that have codes but are float still, by their name in the block.
        """
        block = self.model.get_submodule(names[position])
        self.store.keep_block(names, position, block_tensors(block, waiting))
        self.kept[names[position]] = names, position
        if self.store.streams:
            empty(block)

    def put_back(
        self, names: list[str], position: int, schemes: Mapping[str, Scheme], device: torch.device
    ) -> dict[str, LayerState]:
        """Everything of a finished block but its layers, which are returned to be put in place."""
        block = self.model.get_submodule(names[position])
        tensors = self._read(names, position, device)
        layers = take_layers(block, tensors, schemes)
        tensors |= {f"{key}.weight": state.linear.weight for key, state in layers.items()}
        missing = any(tensor.is_meta for tensor in block.state_dict().values())
        block.load_state_dict(tensors, assign=missing)
        self.kept[names[position]] = names, position
        return layers

    @contextmanager
    def whole(self, device: torch.device) -> Iterator[None]:
        """Within it, every block that was kept has its values."""
        gone = {} if not self.store.streams else self.kept
        for name, (names, position) in gone.items():
            tensors = self._read(names, position, device)
            self.model.get_submodule(name).load_state_dict(tensors, assign=True)
        try:
            yield
        finally:
            for name in gone:
                empty(self.model.get_submodule(name))

    def _read(self, names: list[str], position: int, device: torch.device) -> dict[str, Tensor]:
        tensors = self.store.read_block(names, position)
        return {key: tensor.to(device) for key, tensor in tensors.items()}


def block_tensors(block: nn.Module, waiting: Mapping[str, LayerState]) -> dict[str, Tensor]:
    """All that a finished block consists of, by name: its state dict with every layer quantized.

    Args:
        waiting: layers that have codes but are float still, by their name in the block.
    """
    tensors: dict[str, Tensor] = dict(block.state_dict())
    for key, state in waiting.items():
        del tensors[f"{key}.weight"]
        for name, tensor in buffers_of(state.weight).items():
            if tensor is not None:
                tensors[f"{key}.{name}"] = tensor
    return tensors


def take_layers(
    block: nn.Module, tensors: dict[str, Tensor], schemes: Mapping[str, Scheme]
) -> dict[str, LayerState]:
    """The layers that :func:`block_tensors` had quantized, which are taken out of ``tensors``.

    What the float weight was before is not known any more: ``original`` is the one in the block.
    """
    layers = {}
    for key, scheme in schemes.items():
        linear = block.get_submodule(key)
        assert isinstance(linear, nn.Linear)
        start = f"{key}."
        own = {name: tensors.pop(name) for name in list(tensors) if _is_buffer(name, start)}
        buffers = {name.removeprefix(start): tensor for name, tensor in own.items()}
        weight = weight_of(buffers, scheme, (linear.out_features, linear.in_features))
        layers[key] = LayerState(linear, linear.weight.detach(), scheme, weight)
    return layers


def _is_buffer(name: str, start: str) -> bool:
    return name.startswith(start) and name != f"{start}bias"


def empty(block: nn.Module) -> None:
    """Let go of the values of a block's tensors: shapes and dtypes stay."""
    state = {name: tensor.to("meta") for name, tensor in block.state_dict().items()}
    block.load_state_dict(state, assign=True)
