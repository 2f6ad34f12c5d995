"""Verification in a fresh process: what this one keeps in memory cannot hide what a file lacks.

The process gets a directory and the settings that output bits depend on (device, threads, measured
kernels). It loads the checkpoint as any user would, and sends back hashes: of what it computes,
layer by layer, and of the buffers that no file holds. The tensors it compares with the hashes that
were taken of this process's memory as they were written. It is started, not forked: it has a torch
of its own, and needs nothing of the caller's main module, so it works in a notebook.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ptq.checkpoint.atomic import is_ours
from ptq.checkpoint.free_memory import free_bytes
from ptq.checkpoint.fresh_messages import Reply, Request, Scope, Tuned
from ptq.checkpoint.hashing import tensor_sha256
from ptq.checkpoint.outputs import (
    Outputs,
    align_parameters,
    computed_buffers,
    decodes_text,
    float_dtype,
    layer_outputs,
    model_outputs,
)
from ptq.checkpoint.shard import dtype_name
from ptq.errors import CheckpointError
from ptq.modules import QuantLinear, quantized_modules
from ptq.native import SWITCH, ready

_BASE_BYTES = 600_000_000  # of a process with torch and transformers
_PER_BYTE = 1.2  # of tensors: kernels' own forms, and what the model computes
_LOGITS = "the outputs of the model and of every quantized layer for fixed tokens"
_LAYERS = "every quantized layer's outputs for a fixed input"


def verify_in_fresh_process(directory: Path, model: nn.Module) -> str:
    """Load a checkpoint that has just been written in a new process, and compare with ``model``.

    Args:
        directory: what was written.
        model: what was written there; it is run on fixed inputs, in eval mode, and left as it was,
            but for parameters that move within memory (:func:`align_parameters`).

    Returns:
        What was compared, in words; also what could not be, and why: the outputs of a model that is
        in no memory (streamed), on several devices, or too large to be in memory twice; and those
        of the whole where its class is not one of transformers, which another process cannot build.

    Raises:
        CheckpointError: it does not load there, or is not the same; the tensor or layer is named.
    """
    scope, why = _scope(model)
    reply = _ask(_request(directory, model, scope))
    if reply.error is not None:
        raise CheckpointError(f"what was written does not load in a fresh process: {reply.error}")
    read = "every byte by its hash" if is_ours(directory) else "every tensor"
    if scope == "tensors":
        return f"{read}, in a fresh process; no outputs, as {why}"
    if scope == "layers":
        _compare_outputs(_alone(model), reply)
        return f"{read}, and {_LAYERS}, in a fresh process; not those of the whole, as {why}"
    _compare_computed(model, reply)
    align_parameters(model)
    _compare_outputs(model_outputs(model), reply)
    return f"{read}, and {_LOGITS if decodes_text(model) else _LAYERS}, in a fresh process"


def _alone(model: nn.Module) -> Outputs:
    return layer_outputs(quantized_modules(model), float_dtype(model))


def _scope(model: nn.Module) -> tuple[Scope, str]:
    """How much can be compared, and why not more."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device for tensor in tensors}
    if any(device.type == "meta" for device in devices):
        return "tensors", "the model is not in memory"
    if len(devices) > 1:
        return "tensors", "the model is on several devices"
    size = sum(tensor.nbytes for tensor in {id(t): t for t in tensors}.values())
    needed = int(size * _PER_BYTE) + _BASE_BYTES
    free = free_bytes(next(iter(devices)))
    if free is not None and free < needed:
        return "tensors", (
            f"a second copy of the model needs {needed / 1e9:,.1f} GB of memory and "
            f"{free / 1e9:,.1f} GB are free"
        )
    cls = type(model)
    if not isinstance(model, PreTrainedModel) or getattr(transformers, cls.__name__, None) != cls:
        return "layers", f"{cls.__name__} is not a class of transformers"
    return "model", ""


def _request(directory: Path, model: nn.Module, scope: Scope) -> Request:
    own = isinstance(model, PreTrainedModel) and scope == "model"
    device = next((p.device for p in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    return Request(
        directory=str(directory),
        scope=scope,
        device="cpu" if device.type == "meta" else str(device),
        threads=torch.get_num_threads(),
        dtype=dtype_name(float_dtype(model)),
        matmul_precision=torch.get_float32_matmul_precision(),
        attention=getattr(model.config, "_attn_implementation", None) if own else None,
        tuned=_tuned(model),
    )


def _tuned(model: nn.Module) -> Tuned:
    return {
        name: [
            (device, dtype_name(dtype), [(first, kernel.name) for first, kernel in rows])
            for (device, dtype), rows in layer.tuned.items()
        ]
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear) and layer.tuned
    }


def _ask(request: Request) -> Reply:
    """Start the process, and wait for its answer.

    Raises:
        CheckpointError: it cannot be started, or ended without an answer.
    """
    command = [sys.executable, "-P", "-m", "ptq.checkpoint.fresh_child"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(request)),
            capture_output=True,
            text=True,
            env=_environment(),
        )
    except OSError as error:
        raise CheckpointError(
            f"no fresh process to verify the checkpoint: {command[0]!r} cannot be started "
            f"({error}); verify='files' needs none"
        ) from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"the fresh process that verifies the checkpoint ended with {done.returncode}: {last}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    outputs = [(where, digest) for where, digest in found["outputs"]]
    return Reply(found["error"], outputs, found["computed"])


def _environment() -> dict[str, str]:
    """That of this process, with the places where it looks for modules, and without a network; and
    with the kernels that this one has, whatever was compiled meanwhile."""
    places = [*(path for path in sys.path if path), str(Path(__file__).parents[2])]
    own = {"PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, SWITCH: "1" if ready() else "0"}


def _compare_computed(model: nn.Module, reply: Reply) -> None:
    own = {name: tensor_sha256(buffer) for name, buffer in computed_buffers(model).items()}
    for name in (*own, *reply.computed):
        if own.get(name) != reply.computed.get(name):
            raise CheckpointError(
                f"tensor {name}, which is computed and not stored, is another in a fresh process "
                "(model.to(dtype) changes such tensors); load the model in the dtype that it is to "
                "have, and quantize again"
            )


def _compare_outputs(own: Outputs, reply: Reply) -> None:
    found = reply.outputs
    for (where, digest), (there, other) in zip(own, found, strict=False):
        if (where, digest) != (there, other):
            raise CheckpointError(
                f"the tensors that were written are those in memory, but {where} computes "
                "something else in a fresh process; do not use the model"
            )
    if len(own) != len(found):
        raise CheckpointError(
            f"{len(own)} outputs in memory, {len(found)} in a fresh process; do not use the model"
        )
