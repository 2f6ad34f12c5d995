"""What a refinement is given: a block whose layers have codes already, and its calibration data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ptq.calibrate import BlockStream
from ptq.config import Scheme
from ptq.core import QuantizedWeight
from ptq.kernels import quantize_activation


@dataclass(eq=False)
class LayerState:
    """One layer of a block that is being quantized.

    Args:
        linear: the float layer in the block; its weight holds what the codes stand for.
        original: its float weight [N, K] before quantization.
        scheme: that it is quantized with.
        weight: the codes so far; a refinement replaces them.
    """

    linear: nn.Linear
    original: Tensor
    scheme: Scheme
    weight: QuantizedWeight

    def show(self) -> None:
        """Let the float layer compute with what the codes stand for."""
        with torch.no_grad():
            made = self.weight.dequantize(self.linear.weight.dtype)
            self.linear.weight.copy_(self.weight.restored(made))


@dataclass(eq=False)
class BlockJob:
    """A block between its algorithm and its swap.

    Args:
        block: float, its layers showing their codes.
        position: of the block in the stream.
        layers: by their name within the block.
        stream: the hidden states that enter the block, from the quantized blocks before it.
        targets: per batch, what the float model's block gives.
        seed: for everything random.
    """

    block: nn.Module
    position: int
    layers: dict[str, LayerState]
    stream: BlockStream
    targets: list[Tensor]
    seed: int


@dataclass(frozen=True)
class Refinement:
    """Improves the codes of a block; ``refine(job, options)`` returns notes for the report."""

    refine: Callable[[BlockJob, Any], list[str]]
    options: type[BaseModel]


@dataclass(frozen=True)
class Finish:
    """Tunes the whole model at the end; ``finish(job, options, progress)`` gives notes."""

    finish: Callable[..., list[str]]
    options: type[BaseModel]


@contextmanager
def quantized_inputs(layers: dict[str, LayerState]) -> Iterator[None]:
    """Within the block, layers with quantized activations read what their codes stand for.

    Gradients pass as if nothing had been rounded (straight-through; Bengio et al. 2013).
    """

    def hook(state: LayerState) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor, ...]]:
        def rounded(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
            x: Tensor = arguments[0]
            rows = x.detach().reshape(-1, x.shape[-1])
            weight = state.weight
            made = quantize_activation(
                rows, state.scheme.activations, weight.input_scale, weight.input_zero_point
            )
            near = made.dequantize().to(x.dtype).reshape(x.shape)
            return (x + (near - x.detach()), *arguments[1:])

        return rounded

    handles = [
        state.linear.register_forward_pre_hook(hook(state))
        for state in layers.values()
        if state.scheme.activations is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def learning(module: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients for these parameters of the module and no others; all as before afterwards."""
    before = {p: p.requires_grad for p in module.parameters()}
    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None
