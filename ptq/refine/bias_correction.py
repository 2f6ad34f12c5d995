"""Bias correction: the mean error of a quantized layer's output goes into its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv
1906.04721), section 4.2: quantization shifts the mean of what a layer gives, and the bias can take
that back. As in the paper's empirical version, the shift is measured on data, layer after layer,
those before it corrected already. The float weight is given the same input as the quantized one:
it is the layer's own error that is corrected.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.algorithms import NoOptions
from ptq.calibrate import watching
from ptq.calibrate.inputs import unmasked_rows
from ptq.refine.base import BlockJob, quantized_inputs
from ptq.refine.loss import block_error


@torch.no_grad()
def correct_biases(job: BlockJob, _: NoOptions) -> list[str]:
    """Correct the biases of a block, each only if what the block gives comes nearer by it.

    For any one layer the mean square of its output's error falls by the square of the mean that is
    taken from it; the block may still be better off without. Layers without a bias get none.
    """
    every = range(len(job.targets))
    corrected = 0
    with quantized_inputs(job.layers):
        reached, first = _reached(job)
        best = first
        biases = [name for name in reached if job.layers[name].linear.bias is not None]
    for name in biases:
        bias = job.layers[name].linear.bias
        old = bias.clone()
        bias.add_(mean_error(job, name))
        with quantized_inputs(job.layers):
            error = block_error(job, every)
        if error < best:
            best, corrected = error, corrected + 1
        else:
            bias.copy_(old)
    note = f"bias correction: {corrected} of {len(biases)} biases, error {first:.4g} -> {best:.4g}"
    without = len(reached) - len(biases)
    return [f"{note}; {without} layers have no bias" if without else note]


def _reached(job: BlockJob) -> tuple[list[str], float]:
    """The layers that a token reaches, in the order of their calls; and the block's error."""
    reached: dict[str, None] = {}
    layers = {name: state.linear for name, state in job.layers.items()}
    with watching(layers, lambda name, _: reached.setdefault(name)):
        error = block_error(job, range(len(job.targets)))
    return list(reached), error


@torch.no_grad()
def mean_error(job: BlockJob, name: str) -> Tensor:
    """``E[W x - Wq xq]`` over the calibration rows that are not padding, float32 [N]: W and Wq the
    layer's weight before and after quantization, x and xq its input."""
    state = job.layers[name]
    exact, rounded = _Mean(), _Mean()
    # Hooks run in this order.
    with (
        watching({name: state.linear}, exact.see),
        quantized_inputs(job.layers),
        watching({name: state.linear}, rounded.see),
    ):
        for index, hidden in enumerate(job.stream.hidden):
            exact.mask = rounded.mask = job.stream.masks[index]
            job.stream.calls[index][job.position].run(job.block, hidden)
    x, xq = exact.value(), rounded.value()
    weight = state.weight.restored(state.weight.dequantize(torch.float32))
    # Not W x less Wq xq, of which hardly a digit would be left at 8 bits.
    return (state.original.float() - weight) @ x + weight @ (x - xq)


@dataclass(eq=False)
class _Mean:
    """The mean of the rows of a layer's input."""

    mask: Tensor | None = None
    total: Tensor | float = 0.0  # float64 [K]
    count: int = 0

    def see(self, _: str, x: Tensor) -> None:
        rows = unmasked_rows(x, self.mask)
        self.total = self.total + rows.sum(0, dtype=torch.float64)
        self.count += rows.shape[0]

    def value(self) -> Tensor:
        """float32 [K]; zeros where there was no row but padding."""
        assert isinstance(self.total, Tensor)
        return (self.total / max(1, self.count)).float()
