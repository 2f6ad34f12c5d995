"""Where tensors lie in memory."""

from torch import Tensor


def aligned(tensor: Tensor, size: int) -> Tensor:
    """The tensor; a copy of it where its address is not a multiple of ``size`` bytes.

    torch's own memory is aligned to 64 bytes. Files that are mapped, views and numpy arrays may
    begin anywhere.
    """
    return tensor if tensor.data_ptr() % size == 0 else tensor.clone()
