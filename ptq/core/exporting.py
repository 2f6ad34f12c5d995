"""Whether torch.export is at work."""

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which the compiler of torch before 2.13 takes for true in
    every graph; asked here while a graph is traced instead."""
    return torch.compiler.is_exporting()
