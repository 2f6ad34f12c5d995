"""Loading a checkpoint of any format that ptq reads."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ptq.checkpoint import compressed_tensors, native_read, packed_int32
from ptq.checkpoint.atomic import is_ours
from ptq.checkpoint.foreign import method_of, quantization_of

_FOREIGN: dict[str, Callable[..., nn.Module]] = {
    compressed_tensors.METHOD: compressed_tensors.read,
    **dict.fromkeys(packed_int32.METHODS, packed_int32.read),
}
"""What reads the formats of other toolkits, by ``quant_method``."""


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
        directory: what :func:`ptq.save` wrote, or a checkpoint in the compressed-tensors, GPTQ or
            AWQ format.
        model: for what is not a transformers model: the float model, as built by your code, on
            any device (``torch.device("meta")`` costs no memory). It becomes the quantized model;
            it is not touched before everything has been read and checked.
        verify: compare the tensors, and the files that are read, with their hashes, which only
            ptq's own format has.

    Raises:
        CheckpointError: there is no checkpoint, it is of a newer format, or it is not what was
            written; the tensor or file is named.
        UnsupportedError: the model cannot be built from its config (pass ``model``), or a layer
            has a scheme that ptq does not have.
        ModelError: a buffer that is on the meta device in ``model`` cannot be computed.
    """
    root = native_read.recovered(Path(directory).expanduser())
    read = None if is_ours(root) else _FOREIGN.get(method_of(quantization_of(root)) or "")
    if read is not None:
        return read(root, model=model, device=device)
    return native_read.load(root, model=model, device=device, verify=verify)
