"""The experts of a mixture, each with linear layers of its own."""

import torch
from torch import Tensor, nn

from ptq.model.views import linear_over, without_values

_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What transformers' ``use_experts_implementation`` gives every class of fused experts."""


def is_fused_experts(module: nn.Module) -> bool:
    """Whether all of it is in the tensors of one projection in and one out, a slice per expert."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    weights = _names(module)
    biases = tuple(f"{name}_bias" for name in weights if module.has_bias)
    own = {name for name, p in module.named_parameters() if p is not None}
    return (
        own == {*weights, *biases}
        and next(module.buffers(), None) is None
        and all(getattr(module, name).dim() == 3 for name in weights)
        and not getattr(module, "has_post_expert_norm", False)
        and not getattr(module, "_is_expert_parallel", False)
    )


def _names(fused: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if fused.has_gate else "up_proj"), "down_proj"


class Experts(nn.Module):
    """What a module of fused experts computes, by ``nn.Linear`` layers over the same memory.

    The layers are called ``0.gate_up_proj`` (``0.up_proj`` without a gate), ``0.down_proj``,
    ``1.gate_up_proj`` and so on; their weights are [out, in], whatever the layout was.

    Args:
        fused: of a class that transformers' ``use_experts_implementation`` decorates.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.count = int(fused.num_experts)  # type: ignore[arg-type]
        self.names = _names(fused)
        for number in range(self.count):
            expert = nn.Module()
            for name in self.names:
                expert.add_module(name, _slice(fused, name, number))
            self.add_module(str(number), expert)
        self.stands_for = (without_values(fused),)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' ``grouped_mm_experts_forward``, in the same order of summation.

        Args:
            hidden_states: [T, H].
            top_k_index: integers [T, k], the experts of each token. A number that is no expert's
                gives nothing.
            top_k_weights: [T, k], of what they give.

        Returns:
            [T, H], in the dtype of ``hidden_states``.
        """
        k = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        made = hidden_states.new_zeros(chosen.shape[0], hidden_states.shape[-1])
        for number in torch.unique(chosen).tolist():
            if number < self.count:
                rows = (chosen == number).nonzero().squeeze(-1)
                made[rows] = self._expert(number, hidden_states[rows // k])
        weighted = made * top_k_weights.reshape(-1, 1)
        return weighted.view(-1, k, made.shape[-1]).sum(1).to(hidden_states.dtype)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        fused = self.stands_for[0]
        first, second = (self.get_submodule(f"{number}.{name}") for name in self.names)
        gate = fused._apply_gate if fused.has_gate else fused.act_fn
        made: Tensor = second(gate(first(x)))  # type: ignore[operator]
        return made

    def own_memory(self) -> None:
        """Let go of the fused tensors, which float layers between quantized ones would hold."""
        for layer in (layer for expert in self.children() for layer in expert.children()):
            if type(layer) is nn.Linear:
                for parameter in layer.parameters():
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    @property
    def is_float(self) -> bool:
        """Whether every layer is an ``nn.Linear``."""
        layers = (layer for expert in self.children() for layer in expert.children())
        return all(type(layer) is nn.Linear for layer in layers)

    def fused(self) -> nn.Module:
        """The module that this one, which is float, stands for, with the weights it has now."""
        fused = self.stands_for[0]
        for name in self.names:
            layers = [self.get_submodule(f"{number}.{name}") for number in range(self.count)]
            weights: list[Tensor] = []
            biases: list[Tensor] = []
            for layer in layers:
                assert type(layer) is nn.Linear
                weights.append(layer.weight.T if fused.is_transposed else layer.weight)
                biases.append(layer.bias)
            fused._parameters[name] = _stacked(weights)
            if fused.has_bias:
                fused._parameters[f"{name}_bias"] = _stacked(biases)
        return fused


def _slice(fused: nn.Module, name: str, number: int) -> nn.Linear:
    weight = fused._parameters[name]
    bias = fused._parameters.get(f"{name}_bias")
    assert weight is not None
    matrix = weight.detach()[number]
    return linear_over(
        matrix.T if fused.is_transposed else matrix,
        None if bias is None else bias.detach()[number],
        weight.requires_grad,
    )


def _stacked(tensors: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([t.detach() for t in tensors]), tensors[0].requires_grad)
