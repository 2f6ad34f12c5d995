"""Whether a tensor holds numbers only."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """True if no element is NaN or Inf. One pass without temporaries in the usual case.

    A sum that is finite has only finite terms; one that is not may just have overflowed.
    """
    total = tensor.detach().sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())
