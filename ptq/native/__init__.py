"""ptq's own kernels for x86-64, compiled once on the machine that runs them.

torch's ops are fast at one row or at hundreds, some of them on a second form of the weight. These
read the canonical codes at any number of rows.
"""

from ptq.native.build import build_kernels, find_compiler
from ptq.native.library import SWITCH, native_reason, ready

__all__ = ["SWITCH", "build_kernels", "find_compiler", "native_reason", "ready"]
