"""Distillation: scales and norms tuned end to end, towards the float model's predictions.

The codes stay as they are; only the scales of the weights, and the weights of the norms, move, by
Adam (Kingma & Ba 2015) on the Kullback-Leibler divergence from the float model's next-token
distribution, or on the squared difference of the hidden states where a model has no logits. Tuning
scales alone after the codes are fixed is the second phase of Chen et al. 2024, "EfficientQAT"
(arXiv 2407.11062), section 3.3. It needs the whole model in memory, and its gradients.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from ptq.calibrate import BlockStream, call, outputs_after_blocks
from ptq.calibrate.stream import Progress
from ptq.core import FastProducts
from ptq.refine.base import LayerState, learning, quantized_inputs


class DistillOptions(BaseModel):
    """How long, and how far."""

    model_config = ConfigDict(extra="forbid", strict=True)
    epochs: Annotated[int, Field(ge=1)] = Field(
        1, description="times that the calibration data is gone through"
    )
    sequences: Annotated[int, Field(ge=1)] = Field(2, description="calibration sequences a step")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-3, description="of scales, relative to them"
    )
    norms: bool = Field(True, description="tune the weights of norms as well")


@dataclass(eq=False)
class DistillJob:
    """A whole model whose layers show their codes, and what the float one gives.

    Args:
        layers: by name.
        batches: calibration batches, in the order of the streams.
        stream: the float model's hidden states behind its last block.
        seed: of the order of the batches.
    """

    model: nn.Module
    layers: dict[str, LayerState]
    batches: list[Any]
    stream: BlockStream
    seed: int


@dataclass(eq=False)
class _Gain:
    """The factor on a layer's scales [scale rows, scale columns, 1], which is learned."""

    state: LayerState
    scale: Tensor
    gain: nn.Parameter

    @classmethod
    def of(cls, state: LayerState) -> "_Gain":
        scale = state.weight.scale.float().unsqueeze(-1)
        return cls(state, scale, nn.Parameter(torch.ones_like(scale)))

    def steps(self) -> Tensor:
        """``codes - zero point`` in units of the scale: [scale rows, scale columns, elements]."""
        weight = self.state.weight
        steps = weight.granularity.split(weight.codes).float()
        return steps if weight.zero_point is None else steps - weight.zero_point.unsqueeze(-1)

    @torch.no_grad()
    def show(self) -> None:
        held = self.state.weight
        weight = self.steps().mul_(self.scale * self.gain).reshape(held.shape)
        self.state.linear.weight.copy_(held.restored(weight))

    @torch.no_grad()
    def pull(self) -> None:
        """The gradient of the gain, from that of the weight."""
        gradient = self.state.linear.weight.grad
        if gradient is None:  # no token of the batch reached it (an expert)
            return
        steps = self.steps()
        product = steps.mul_(self.state.weight.sorted(gradient.float()).reshape(steps.shape))
        self.gain.grad = product.sum(-1, keepdim=True).mul_(self.scale)
        self.state.linear.weight.grad = None

    def finish(self) -> None:
        weight = self.state.weight
        scale = (self.scale * self.gain.detach()).squeeze(-1).to(weight.scale.dtype)
        self.state.weight = replace(weight, scale=scale)
        self.state.show()


def distill(job: DistillJob, options: DistillOptions, progress: Progress = iter) -> list[str]:
    """Tune the scales of all layers, and the norms, in place; returns notes for the report."""
    gains = [_Gain.of(state) for state in job.layers.values()]
    norms = _norm_weights(job.model, job.stream.names) if options.norms else []
    groups = [
        {"params": [g.gain for g in gains], "lr": options.learning_rate},
        {"params": norms, "lr": options.learning_rate},
    ]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.95))
    weights = [state.linear.weight for state in job.layers.values()]
    steps = list(_steps(len(job.batches), options, job.seed))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, len(steps))
    losses: list[float] = []
    with learning(job.model, [*weights, *norms]), quantized_inputs(job.layers), torch.enable_grad():
        for chosen in progress(steps):
            losses.append(sum(_backward(job, index, len(chosen)) for index in chosen))
            for gain in gains:
                gain.pull()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for gain in gains:
                gain.show()
    for gain in gains:
        gain.finish()
    part = max(1, len(losses) // 4)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    return [f"distill: divergence {first:.4f} (first quarter) -> {last:.4f} (last quarter)"]


def _steps(count: int, options: DistillOptions, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, options.sequences):
            yield order[start : start + options.sequences]


def _backward(job: DistillJob, index: int, share: int) -> float:
    batch = job.batches[index]
    target = outputs_after_blocks(job.model, job.stream, batch, index)
    with FastProducts():
        made = call(job.model, batch, index)
    loss = _distance(made, target, job.stream.masks[index]) / share
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _distance(made: Any, target: Any, mask: Tensor | None) -> Tensor:
    """KL divergence of logits, else the relative squared difference of hidden states."""
    logits = getattr(made, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 3:
        fits = mask is not None and mask.shape == logits.shape[:2]  # not an encoder's mask
        kept = mask.to(logits.device) if mask is not None and fits else slice(None)
        ours = F.log_softmax(logits[kept].float(), -1).flatten(0, -2)
        theirs = F.log_softmax(target.logits[kept].float(), -1).flatten(0, -2)
        return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    ours, theirs = made[0].float(), target[0].float()
    if mask is not None and mask.shape == ours.shape[:2]:
        ours, theirs = ours[mask.to(ours.device)], theirs[mask.to(ours.device)]
    error: Tensor = (ours - theirs).square().mean() / theirs.square().mean()
    return error


def _norm_weights(model: nn.Module, blocks: Iterable[str]) -> list[nn.Parameter]:
    """The one-dimensional weights in the blocks: those of norms. What comes after the blocks
    belongs to the float model's predictions as well, and stays."""
    return [
        parameter
        for block in blocks
        for name, parameter in model.get_submodule(block).named_parameters()
        if name.endswith("weight") and parameter.ndim == 1 and parameter.is_floating_point()
    ]
