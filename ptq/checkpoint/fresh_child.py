"""The other side of :mod:`ptq.checkpoint.fresh`: a process that knows nothing but a directory.

``python -P -m ptq.checkpoint.fresh_child`` reads a ``Request`` from standard input and answers
with a ``Reply`` on standard output, both JSON (:mod:`ptq.checkpoint.fresh_messages`).
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ptq.checkpoint.atomic import is_ours
from ptq.checkpoint.fresh_messages import Reply, Request, Tuned
from ptq.checkpoint.hashing import tensor_sha256
from ptq.checkpoint.load import load
from ptq.checkpoint.lone_layers import lone_layers
from ptq.checkpoint.manifest_read import read_manifest
from ptq.checkpoint.outputs import Outputs, computed_buffers, layer_outputs, model_outputs
from ptq.checkpoint.verify import verify_bytes
from ptq.errors import CheckpointError, PTQError
from ptq.kernels import KERNELS
from ptq.modules import quantized_layers


def answer(request: Request) -> Reply:
    """Check a directory as the request says."""
    torch.set_num_threads(request.threads)
    torch.set_float32_matmul_precision(request.matmul_precision)
    root = Path(request.directory)
    try:
        if is_ours(root):
            problems = verify_bytes(root)
            if problems:
                raise CheckpointError("; ".join(problems[:3]))
        return _run(root, request)
    except PTQError as error:
        return Reply(error=str(error))


def _run(root: Path, request: Request) -> Reply:
    if request.scope == "tensors":
        return Reply()
    if request.scope == "layers":
        dtype = getattr(torch, request.dtype)
        found: Outputs = []
        for name, layer in lone_layers(root, read_manifest(root), torch.device(request.device)):
            _tune({name: layer}, request.tuned)
            found += layer_outputs({name: layer}, dtype)
        return Reply(outputs=found)
    model = load(root, device=request.device, verify=False)  # the hashes have been compared
    if request.attention is not None:
        model.set_attn_implementation(request.attention)  # type: ignore[operator]
    _tune(dict(quantized_layers(model)), request.tuned)
    computed = {name: tensor_sha256(buffer) for name, buffer in computed_buffers(model).items()}
    return Reply(outputs=model_outputs(model), computed=computed)


def _tune(layers: dict[str, Any], tuned: Tuned) -> None:
    kernels = {kernel.name: kernel for kernel in KERNELS}
    for name in layers.keys() & tuned.keys():
        for device, dtype, rows in tuned[name]:
            choice = tuple((first, kernels[kernel]) for first, kernel in rows)
            layers[name].tune(device, getattr(torch, dtype), choice)


def main() -> None:
    """Answer one request; what others print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = Request(**json.load(sys.stdin))
    with answers:
        json.dump(asdict(answer(request)), answers)


if __name__ == "__main__":
    main()
