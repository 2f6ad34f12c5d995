"""torch.compile for whole models: ``ptq.compile``."""

from ptq.compilation.model import CompiledGenerate, compile_model

__all__ = ["CompiledGenerate", "compile_model"]
