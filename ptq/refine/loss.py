"""How far what a block gives is from what the float model's block gives."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ptq.refine.base import BlockJob


def block_loss(job: BlockJob, index: int) -> Tensor:
    """Mean over the tokens of the squared difference from the float model's hidden states, relative
    to the token's own mean square: the norm that reads it divides by that, and without it a few
    tokens with massive activations would be all that counts. Padding is not counted.
    """
    call = job.stream.calls[index][job.position]
    target = job.targets[index].float()
    made = call.run(job.block, job.stream.hidden[index]).float()
    size = target.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    error = (made - target).square().mean(-1) / size
    mask = job.stream.masks[index]
    if mask is not None and mask.shape == error.shape:
        error = error[mask.to(error.device)]
    return error.mean()


@torch.no_grad()
def block_error(job: BlockJob, batches: Iterable[int]) -> float:
    """The mean of the loss over some batches, with the weights that the layers show."""
    losses = [float(block_loss(job, index)) for index in batches]
    return sum(losses) / len(losses)
