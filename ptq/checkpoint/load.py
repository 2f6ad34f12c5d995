"""Loading a checkpoint of any format that ptq reads."""

from pathlib import Path

import torch
from torch import nn

from ptq.checkpoint import compressed_tensors, native_read
from ptq.checkpoint.atomic import is_ours
from ptq.checkpoint.foreign import method_of, quantization_of


def load(
    directory: str | Path,
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> nn.Module:
    """The quantized model of a checkpoint, in eval mode, bit for bit as it was saved.

    The model is built without weights; each tensor is read once, into memory of its own. Its
    ``save_pretrained`` writes a ptq checkpoint, whatever the format was.

    Args:
        directory: what :func:`ptq.save` wrote, or a checkpoint in the compressed-tensors format.
        model: for what is not a transformers model: the float model, as built by your code, on
            any device (``torch.device("meta")`` costs no memory). It becomes the quantized model;
            it is not touched before everything has been read and checked.
        verify: compare the tensors, and the files that are read, with their hashes, which the
            compressed-tensors format does not have.

    Raises:
        CheckpointError: there is no checkpoint, it is of a newer format, or it is not what was
            written; the tensor or file is named.
        UnsupportedError: the model cannot be built from its config (pass ``model``), or a layer
            has a scheme that ptq does not have.
        ModelError: a buffer that is on the meta device in ``model`` cannot be computed.
    """
    root = native_read.recovered(Path(directory).expanduser())
    if not is_ours(root) and method_of(quantization_of(root)) == compressed_tensors.METHOD:
        return compressed_tensors.read(root, model=model, device=device)
    return native_read.load(root, model=model, device=device, verify=verify)
