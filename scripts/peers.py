"""Other toolkits on the same model and tokens, each run in an environment of its own."""

import copy
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peer_quantize import PEERS
from safetensors.torch import load_file
from torch import nn

from ptq.calibrate import TokenSet
from ptq.config import preset
from ptq.errors import ConfigError

NAMES = tuple(PEERS)
_SCRIPT = Path(__file__).with_name("peer_quantize.py")


@dataclass(frozen=True)
class Peer:
    """A toolkit, and the interpreter of an environment that has it."""

    name: str
    python: Path


def peer(text: str) -> Peer:
    """``NAME=PYTHON``, checked.

    Raises:
        ConfigError: no such toolkit or interpreter.
    """
    name, _, python = text.partition("=")
    if name not in NAMES or not Path(python).is_file():
        raise ConfigError(
            f"--peers {text}: give NAME=PYTHON, a name of {', '.join(NAMES)} and the interpreter "
            "of an environment that has it"
        )
    return Peer(name, Path(python))


def run_peer(command: list[str], failure: str) -> dict[str, Any]:
    """What a script says in its last line, as JSON; it does not see this process's PYTHONPATH.

    Raises:
        ConfigError: it failed: ``failure``, and its last line.
    """
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{failure}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def prepare(directory: Path, model: Any, tokenizer: Any, tokens: TokenSet) -> None:
    """Write the float model and the calibration tokens to where the peers read them."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    rows = [torch.as_tensor(sequence).tolist() for sequence in tokens.sequences]
    (directory / "tokens.json").write_text(json.dumps(rows), encoding="utf-8")


def quantize(
    peer: Peer, directory: Path, model: nn.Module, scheme: str, iterations: int
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of the model with the peer's weights, and the peer's own ``seconds``,
    ``peak_memory_bytes`` and ``version``.

    Args:
        iterations: of auto-round.

    Raises:
        ConfigError: the scheme is not int weights in groups, or the peer failed (its last line).
    """
    weights = preset(scheme).weights
    if weights.group_size is None or preset(scheme).activations is not None:
        raise ConfigError(f"--peers: {scheme} is not weight-only in groups; such as w4a16-g64")
    output = directory / f"{peer.name}.safetensors"
    command = [str(peer.python), str(_SCRIPT), peer.name, str(directory)]
    command += [str(directory / "tokens.json"), str(output)]
    command += ["--bits", str(weights.int_format.bits), "--group-size", str(weights.group_size)]
    command += ["--symmetric"] if weights.symmetric else []
    command += ["--iterations", str(iterations)]
    figures = run_peer(command, f"{peer.name} ({peer.python}) failed on {scheme}")
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in load_file(output).items():
            made.get_parameter(name).copy_(weight)
    return made, figures
