"""A block between its algorithm and its swap, without the engine."""

import copy

import torch
from torch import nn

from ptq.algorithms import round_to_nearest, with_static_input
from ptq.calibrate import BlockCall, BlockStream
from ptq.config import preset
from ptq.refine import BlockJob, LayerState


def block() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)).requires_grad_(False)


def job(scheme: str, sequences: int = 6) -> tuple[BlockJob, nn.Module]:
    """A block that shows its rounded weights, and the float one."""
    exact = block()
    rounded = copy.deepcopy(exact)
    layers = {}
    for name in ("0", "2"):
        linear = rounded.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        asked = preset(scheme)
        codes = round_to_nearest(linear.weight, asked.weights)
        if asked.activations is not None and asked.activations.mode == "static":
            ends = torch.tensor([-2.5, 2.5])
            codes = with_static_input(codes, asked.activations, *ends)
        layers[name] = LayerState(linear, linear.weight.clone(), asked, codes)
        layers[name].show()
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(1, 20, 32, generator=generator) for _ in range(sequences)]
    call = BlockCall((), None, {})
    stream = BlockStream(["b"], hidden, [[call]] * sequences, [None] * sequences)
    return BlockJob(rounded, 0, layers, stream, [exact(x) for x in hidden], seed=0), exact
