"""Learned rounding: signed gradient descent on the rounding and the scales of one block.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs" (arXiv 2309.05516), sections 3.1 and 3.2: what a block gives should be what the float
model's block gives, whichever way each single weight is rounded. Here it starts from the codes that
the algorithm before it has found, and the scales move along with the rounding.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ptq.core import pack
from ptq.formats import IntFormat
from ptq.refine.base import BlockJob, LayerState, learning, quantized_inputs
from ptq.refine.loss import block_error, block_loss

_EDGE = 0.49  # of a code's cell: where a weight starts whose code is not the nearest one


class LearnedRoundingOptions(BaseModel):
    """How long, on how much, and how far."""

    model_config = ConfigDict(extra="forbid", strict=True)
    iterations: Annotated[int, Field(ge=1)] = Field(100, description="steps of descent for a block")
    sequences: Annotated[int, Field(ge=1)] = Field(4, description="calibration sequences a step")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of the rounding, as a share of a step of the scale (default: 1 / iterations)",
    )
    scales: bool = Field(True, description="learn the scales too")
    scale_rate: Annotated[float, Field(gt=0)] = Field(
        0.03, description="learning rate of the scales over the rounding's"
    )
    scale_range: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="scales change by this share at most"
    )


@dataclass(eq=False)
class _Learned:
    """What is learned of one layer, and what it makes of it: tensors [scale rows, scale columns,
    elements], or with one element per scale.

    ``exact`` is the weight in units of its first scale; ``shift`` is added before it is rounded,
    the zero point included; ``gain`` multiplies the first scale. ``codes`` is scratch memory.
    """

    state: LayerState
    exact: Tensor
    shift: Tensor
    gain: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codes: Tensor

    @classmethod
    def of(cls, state: LayerState) -> "_Learned":
        weight = state.weight
        scale = weight.scale.float().unsqueeze(-1)
        zero_point = None if weight.zero_point is None else weight.zero_point.float().unsqueeze(-1)
        codes = weight.granularity.split(weight.codes).float()
        exact = weight.granularity.split(weight.sorted(state.original.float())) / scale
        u = exact if zero_point is None else exact + zero_point
        # A code at the end of its range stands for all that lies beyond it.
        low = torch.where(codes == weight.format.qmin, -torch.inf, codes - _EDGE)
        high = torch.where(codes == weight.format.qmax, torch.inf, codes + _EDGE)
        shift = torch.minimum(torch.maximum(u, low), high) - exact
        return cls(state, exact, shift, torch.ones_like(scale), scale, zero_point, codes)

    def round(self) -> Tensor:
        """The codes as whole numbers; in memory that the next call overwrites."""
        fmt = self.state.weight.format
        torch.div(self.exact, self.gain, out=self.codes)
        return self.codes.add_(self.shift).round_().clamp_(fmt.qmin, fmt.qmax)

    @torch.no_grad()
    def show(self) -> None:
        """Put the weight that the codes stand for into the layer; ``codes`` is left without its
        zero point."""
        self.round()
        if self.zero_point is not None:
            self.codes.sub_(self.zero_point)
        weight, held = self.state.linear.weight, self.state.weight
        scale = self.scale * self.gain
        plain = held.input_order is None and weight.dtype == torch.float32
        if plain and weight.is_contiguous():
            torch.mul(self.codes, scale, out=weight.view(self.codes.shape))
        else:
            weight.copy_(held.restored((self.codes * scale).view(weight.shape)))

    @torch.no_grad()
    def step(self, rate: float, options: LearnedRoundingOptions) -> None:
        """Move against the sign of the gradient; ``show`` was called before."""
        gradient = self.state.linear.weight.grad
        if gradient is None:  # no token of the batch reached it (an expert)
            return
        parts = self.state.weight.sorted(gradient.float()).reshape(self.exact.shape)
        if options.scales:
            # d(weight)/d(scale): straight through the rounding, the code less the exact quotient.
            slope = self.codes.sub_(self.exact / self.gain)
            towards = torch.linalg.vecdot(parts, slope).unsqueeze(-1) * self.scale
            self.gain.sub_(towards.sign_(), alpha=rate * options.scale_rate)
            self.gain.clamp_(1 - options.scale_range, 1 + options.scale_range)
        self.shift.sub_(parts.sign_().mul_(self.scale.sign()), alpha=rate)
        self.state.linear.weight.grad = None

    def keep(self) -> tuple[Tensor, Tensor]:
        """Copies of what is learned."""
        return self.shift.clone(), self.gain.clone()

    def finish(self, kept: tuple[Tensor, Tensor]) -> None:
        """Make the codes of what was kept the layer's."""
        self.shift, self.gain = kept
        weight = self.state.weight
        scale = (self.scale * self.gain).to(weight.scale.dtype)
        codes = self.round().to(torch.int8).reshape(weight.shape)
        self.state.weight = replace(
            weight, packed=pack(codes, weight.format), scale=scale.squeeze(-1)
        )
        self.state.show()


def learn_rounding(job: BlockJob, options: LearnedRoundingOptions) -> list[str]:
    """Learn the rounding (and scales) of all layers of a block together.

    The rounding that gave the least error on a fixed set of sequences is kept, the first one
    included, so the block gets no worse on them.
    """
    states = [s for s in job.layers.values() if isinstance(s.weight.format, IntFormat)]
    if not states:
        return ["learned rounding: no layer has integer codes, left as it was"]
    learned = [_Learned.of(state) for state in states]
    generator = torch.Generator().manual_seed(job.seed)
    count = len(job.targets)
    weights = [state.linear.weight for state in states]
    with learning(job.block, weights), quantized_inputs(job.layers), torch.enable_grad():
        before, after, kept = _descend(job, learned, options, generator, count)
    for one, best in zip(learned, kept, strict=True):
        one.finish(best)
    return [f"learned rounding: error {before:.4g} -> {after:.4g}"]


def _descend(
    job: BlockJob,
    learned: list[_Learned],
    options: LearnedRoundingOptions,
    generator: torch.Generator,
    count: int,
) -> tuple[float, float, list[tuple[Tensor, Tensor]]]:
    rate = options.learning_rate or 1 / options.iterations
    check = _check_set(count, options.sequences)
    every = max(1, options.iterations // 10)
    first = best = _error(job, learned, check)
    kept = [one.keep() for one in learned]
    for iteration in range(options.iterations):
        for one in learned:
            one.show()
        batch = torch.randint(count, (min(options.sequences, count),), generator=generator)
        for index in batch.tolist():
            block_loss(job, index).backward()  # type: ignore[no-untyped-call]
        now = rate * (1 - iteration / options.iterations)
        for one in learned:
            one.step(now, options)
        if (iteration + 1) % every == 0 and iteration + 1 >= options.iterations // 2:
            error = _error(job, learned, check)
            if error < best:
                best, kept = error, [one.keep() for one in learned]
    return first, best, kept


def _check_set(count: int, sequences: int) -> list[int]:
    """Sequences, evenly spaced, whose error decides what is kept."""
    size = min(count, max(8, sequences))
    return [i * count // size for i in range(size)]


@torch.no_grad()
def _error(job: BlockJob, learned: list[_Learned], check: list[int]) -> float:
    for one in learned:
        one.show()
    return block_error(job, check)
