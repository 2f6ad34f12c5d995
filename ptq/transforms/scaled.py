"""The error of one quantized layer whose rows and columns are both scaled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.transforms.search import Target, quantized_output


@dataclass(eq=False)
class ScaledLayer:
    """A quantized layer of a chain, before it is scaled.

    Args:
        target: the layer, rows of its input, and its scheme.
        importance: float32 [N], what the square of an error of each output channel counts: the
            squared norm of the columns that read it. (To first order: what is between the
            layers is taken to pass errors on as they are, and those of the channels to be
            independent.)
    """

    target: Target
    importance: Tensor

    def __post_init__(self) -> None:
        self.size = self._sum(self.target.exact)

    def error(self, out: Tensor, into: Tensor) -> float:
        """``||out * Qa(x / into) Qw(W into / out)^T - x W^T||^2``, channels by their importance,
        relative to ``||x W^T||^2``; the weight in the dtype of W, rounded to nearest.

        Args:
            out: float32 [N]; the rows of W are divided by it.
            into: float32 [K]; its columns are multiplied by it.
        """
        old = self.target.weight
        weight = (old.float() * into / out[:, None]).to(old.dtype)
        made = quantized_output(self.target.rows / into, weight, self.target.scheme) * out
        return self._sum(made - self.target.exact) / self.size if self.size else 0.0

    def _sum(self, y: Tensor) -> float:
        return float((y.square() * self.importance).sum(dtype=torch.float64))
