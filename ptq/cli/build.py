"""Compile ptq's own kernels for this processor, which every process then uses.

They read the quantized weights as they are stored, at any number of rows. Needs an x86-64 processor
with AVX512-VNNI and AVX512-BF16, and a C++ compiler: g++ or clang++, or what CXX says.
"""

import argparse

from ptq.command import command_parser, run_command


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    return command_parser(__doc__, prog=prog)


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    parser(prog).parse_args(arguments)
    from ptq.native import build_kernels

    return run_command(lambda: print(f"kernels    {build_kernels()}"))
