"""The compressed-tensors format, which llm-compressor writes and vLLM and transformers load."""

from ptq.checkpoint.compressed_tensors.groups import METHOD
from ptq.checkpoint.compressed_tensors.read import read
from ptq.checkpoint.compressed_tensors.write import Engine, Scales, write

__all__ = ["METHOD", "Engine", "Scales", "read", "write"]
