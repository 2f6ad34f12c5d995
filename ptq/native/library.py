"""Loading the compiled kernels as torch ops ``ptq::*``, and what graphs are told about them."""

import os
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ptq.native.sources import library_path

SWITCH = "PTQ_NATIVE"
"""An environment variable: 0 leaves the kernels unused."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def native_reason() -> str | None:
    """Why ptq's own kernels cannot be used."""
    reason = processor_reason()
    if reason is None and _switched_off():
        return f"switched off by {SWITCH}=0"
    if reason is None and not ready():
        return "not compiled on this machine: `ptq build` does that once"
    return reason


def processor_reason() -> str | None:
    """Why they are not for this processor."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and torch.cpu._is_vnni_supported() and torch.cpu._is_avx512_bf16_supported():
        return None
    return "for x86-64 processors with AVX512-VNNI and AVX512-BF16"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def ready() -> bool:
    """Whether the ops are there: compiled now or in an earlier process."""
    return library_loaded()


@cache
def library_loaded() -> bool:
    """Load the library if it has been built."""
    path = library_path()
    if processor_reason() is not None or _switched_off() or not path.exists():
        return False
    load(path)
    return True


def _switched_off() -> bool:
    return os.environ.get(SWITCH) == "0"


def load(path: Path) -> None:
    """Register the ops, and their shapes for graphs, if that was not done in this process."""
    if hasattr(torch.ops.ptq, "linear_int8"):
        return
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    torch.library.register_fake("ptq::quantize_rows", _quantize_rows)
    torch.library.register_fake("ptq::rotate_rows", _rotate_rows)
    torch.library.register_fake("ptq::linear_int8", _linear_int8)
    torch.library.register_fake("ptq::linear_groups", _linear_groups)
    torch.library.register_fake("ptq::linear_float", _linear_float)


def _quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _rotate_rows(x: Tensor, _left: Tensor, _right: Tensor) -> Tensor:
    return torch.empty_like(x)


def _linear_int8(
    x: Tensor, _x_scale: Tensor, w: Tensor, _w_scale: Tensor, _sums: Tensor, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)


def _linear_groups(
    x: Tensor,
    _x_scale: Tensor,
    codes: Tensor,
    _scale: Tensor,
    _zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=dtype)


def _linear_float(
    x: Tensor,
    _x_scale: Tensor | None,
    codes: Tensor,
    _scale: Tensor,
    _zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=dtype)
