"""Whether Triton's programs can run, and on which memory."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError

import torch
from torch import Tensor

_CAPABILITY = (8, 0)  # bfloat16 in the matrix units


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_reason() -> str | None:
    """Why they cannot."""
    return _reason()


@cache
def _reason() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: torch's CUDA builds for Linux bring it"
    if not torch.cuda.is_available():
        return "there is no GPU here"
    devices = range(torch.cuda.device_count())
    found = min(torch.cuda.get_device_capability(device) for device in devices)
    if found < _CAPABILITY:
        return f"compute capability {found[0]}.{found[1]}: Triton's programs need 8.0"
    return _launch_reason()


def _launch_reason() -> str | None:
    """Why a small program does not run: Triton needs a C compiler and Python's headers."""
    from ptq.kernels import triton_launch

    try:
        triton_launch.quantize_rows(torch.ones((1, 16), device="cuda"), torch.int8)
    except (RuntimeError, OSError, ImportError, CalledProcessError) as error:
        return f"Triton cannot launch: {error}"
    return None


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which must be that of x."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return nullcontext()
    return torch.cuda.device(x.device)
