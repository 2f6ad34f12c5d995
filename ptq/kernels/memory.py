"""Where tensors lie in memory."""

import torch
from torch import Tensor


def aligned(tensor: Tensor, size: int) -> Tensor:
    """The tensor; a copy of it where its address is not a multiple of ``size`` bytes.

    torch's own memory is aligned to 64 bytes. Files that are mapped, views and numpy arrays may
    begin anywhere. While ``torch.compile`` traces, nothing has an address, and the tensor is
    returned: loading has aligned the codes, and torch makes the activations.
    """
    if torch.compiler.is_compiling():
        return tensor
    return tensor if tensor.data_ptr() % size == 0 else tensor.clone()
