"""Bytes of tensors in the checkpoint."""

import torch

from ptq.config import Scheme
from ptq.core import packed_width
from ptq.model.layers import LayerInfo, TensorInfo


def quantized_bytes(info: LayerInfo, scheme: Scheme, dtype: torch.dtype | None) -> int:
    """Bytes of a QuantLinear's tensors, as the checkpoint will hold them."""
    rows, columns = info.shape
    weights = scheme.weights
    scales = torch.Size(weights.granularity_value.scale_shape((rows, columns))).numel()
    per_scale = weights.torch_scale_dtype.itemsize + (0 if weights.symmetric else 1)
    total = rows * packed_width(columns, weights.number_format.bits) + scales * per_scale
    if scheme.activations is not None and scheme.activations.mode == "static":
        total += 4 if scheme.activations.symmetric else 8
    if scheme.input_order:
        total += 4 * columns
    return total + sum(tensor_bytes(t, dtype) for t in info.tensors if t.name != "weight")


def tensor_bytes(tensor: TensorInfo, dtype: torch.dtype | None) -> int:
    """Bytes in the checkpoint: float parameters are cast, buffers keep their dtype."""
    stored = tensor.dtype
    if dtype is not None and tensor.is_parameter and tensor.dtype.is_floating_point:
        stored = torch.float32 if dtype in tensor.float32_in else dtype
    return torch.Size(tensor.shape).numel() * stored.itemsize


def untied_bytes(info: LayerInfo, dtype: torch.dtype | None) -> int:
    """Bytes of the weight that a tied output head gets for its own."""
    return torch.Size(info.shape).numel() * (dtype or info.dtype).itemsize


def megabytes(count: int) -> str:
    """Bytes as text; four decimals for what is small."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e6:.4f} MB"
