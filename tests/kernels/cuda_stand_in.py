"""CUDA ops of torch on a machine without a GPU: the documented contract enforced, then computed.

The contracts are those of torch 2.13's CUDA implementations (aten/src/ATen/native/cuda: Blas.cpp
for _int_mm, int4mm.cu for the tinygemm ops, ScaledBlas.cpp for _scaled_mm). A call
outside them raises, as on a GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """What ``_convert_weight_to_int4pack`` returns here."""

    codes: Tensor
    inner_k_tiles: int


@dataclass(frozen=True)
class Device:
    """Stands in for ``torch.cuda``."""

    capability: tuple[int, int]

    def is_available(self) -> bool:
        return True

    def get_device_capability(self) -> tuple[int, int]:
        return self.capability


class CudaOps:
    """Stands in for ``torch`` in the CUDA kernels."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.cuda = Device(capability)

    def _int_mm(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.int8
        assert a.shape[0] > 16, f"self.size(0) needs to be greater than 16, but got {a.shape[0]}"
        assert a.shape[1] > 0 and a.shape[1] % 8 == 0, "self.size(1) must be a multiple of 8"
        assert b.shape[1] > 0 and b.shape[1] % 8 == 0, "mat2.size(1) must be a multiple of 8"
        assert a.is_contiguous()
        return (a.double() @ b.double()).to(torch.int32)

    def _convert_weight_to_int4pack(self, packed: Tensor, inner_k_tiles: int) -> Tiles:
        assert packed.dtype == torch.uint8
        assert packed.is_contiguous()
        n, k = packed.shape[0], packed.shape[1] * 2
        assert inner_k_tiles in (2, 4, 8)
        assert n % 8 == 0 and k % (inner_k_tiles * 16) == 0
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(n, k)
        return Tiles(codes, inner_k_tiles)

    def _weight_int4pack_mm(self, x: Tensor, tiles: Tiles, group: int, sz: Tensor) -> Tensor:
        n, k = tiles.codes.shape
        assert x.dtype == sz.dtype == torch.bfloat16
        assert x.is_contiguous() and sz.is_contiguous()
        assert x.shape[1] == k
        assert group in (32, 64, 128, 256)
        assert sz.shape == (k // group, n, 2)
        scale, zero = (t.t().float().repeat_interleave(group, dim=1) for t in sz.unbind(-1))
        weight = (tiles.codes.float() - 8) * scale + zero
        return (x.float() @ weight.t()).to(torch.bfloat16)

    def _scaled_mm(
        self, a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype
    ) -> Tensor:
        assert self.cuda.capability >= (8, 9), "float8 needs a compute capability of 8.9"
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]
        assert a.is_contiguous(), "mat1 must be row_major"
        assert b.t().is_contiguous(), "mat2 must be col_major"
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert out_dtype == torch.bfloat16, "row-wise scaling gives bfloat16"
        return ((a.double() @ b.double()) * scale_a * scale_b).to(out_dtype)
