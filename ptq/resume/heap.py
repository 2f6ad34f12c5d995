"""The C library's heap, which otherwise grows with every block although nothing is held."""

import ctypes
import platform

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE = 1 << 20


def steady() -> None:
    """From now on, memory of tensors from 1 MiB up goes back to the system when they are freed.

    glibc raises this limit by itself, up to 32 MiB, with each large tensor that is freed, and then
    keeps them in a heap with holes. Elsewhere there is nothing to do.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Give free pages within the heap back to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
