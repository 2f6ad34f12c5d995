"""Compiling the kernels: one call of a C++ compiler, a shared library in the user's cache."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ptq.errors import UnsupportedError
from ptq.native.library import library_loaded, load, processor_reason
from ptq.native.sources import FLAGS, LINKED, SOURCES, library_path


def build_kernels() -> Path:
    """Compile ptq's own kernels for this processor, if that was not done before, and load them.

    Takes some ten seconds. The library is kept in ``$XDG_CACHE_HOME/ptq`` or ``~/.cache/ptq``, and
    used from then on by every process: :func:`ptq.explain` says where. Layers that have run in this
    process keep the kernels that they had.

    Returns:
        The library.

    Raises:
        UnsupportedError: the processor lacks AVX512-VNNI or AVX512-BF16, there is no C++ compiler,
            or it fails.
    """
    reason = processor_reason()
    if reason is not None:
        raise UnsupportedError(f"ptq's own kernels are {reason}; torch's serve this processor")
    path = library_path()
    if not path.exists():
        _compile(path)
    load(path)
    library_loaded.cache_clear()
    return path


def find_compiler() -> str | None:
    """``$CXX``, g++ or clang++: the first that there is."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)


def _compile(path: Path) -> None:
    """The library appears as a whole: another process may be building it too."""
    compiler = find_compiler()
    if compiler is None:
        raise UnsupportedError(
            "ptq's own kernels need a C++ compiler: install g++ or clang++, or set CXX"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        words = [compiler, *FLAGS, str(SOURCES / "cpu.cpp"), "-o", str(made), *LINKED]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next(
                (line for line in done.stderr.splitlines() if "error" in line), "no message"
            )
            raise UnsupportedError(
                f"{compiler} cannot compile ptq's own kernels ({said}): they need GCC 12 or "
                "Clang 14, and torch 2.10"
            )
        made.replace(path)
