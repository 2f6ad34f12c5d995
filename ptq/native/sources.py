"""What the library is made of, and where it is kept."""

import hashlib
import os
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
_ROOT = Path(torch.__file__).parent
FLAGS = (
    "-std=c++20", "-O3", "-shared", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
    "-mavx512vnni", "-mavx512bf16", "-mf16c", "-mfma", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{_ROOT / 'include'}",
)  # fmt: skip
LINKED = (f"-L{_ROOT / 'lib'}", "-ltorch_cpu")


def library_path() -> Path:
    """Where the library of these sources and this torch is, or will be."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ptq" / f"kernels-{_fingerprint()}.so"


@cache
def _fingerprint() -> str:
    made_of = [torch.__version__, *FLAGS]
    made_of += [p.read_text() for p in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp"))]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
