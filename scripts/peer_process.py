"""Other toolkits as candidates of bench_model.py, each in a process that is idle between turns."""

import json
import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from model_candidates import Candidate
from peer_model import METHODS

from ptq.errors import ConfigError

_SCRIPT = Path(__file__).with_name("peer_model.py")
_QUIET = 0.02  # seconds that a pool's threads may spin for after their work


def peer_methods(text: str) -> list[tuple[str, Path]]:
    """``NAME=PYTHON``, checked: each method of that name, or of that toolkit, and the interpreter.

    Raises:
        ConfigError: no such method or interpreter.
    """
    name, _, python = text.partition("=")
    methods = [method for method in METHODS if name in (method, method.partition("-")[0])]
    if not methods or not Path(python).is_file():
        raise ConfigError(
            f"--peers {text}: give NAME=PYTHON, a name of {', '.join(METHODS)}, or a toolkit for "
            "all that it has, and the interpreter of an environment that has it"
        )
    return [(method, Path(python)) for method in methods]


class PeerProcess:
    """A running peer_model.py.

    Raises:
        ConfigError: it failed: its last line.
    """

    def __init__(self, method: str, python: Path, arguments: list[str], stack: ExitStack) -> None:
        self.name = f"{method} ({python})"
        self.errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [str(python), str(_SCRIPT), method, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, env=env,
        )  # fmt: skip
        stack.callback(self.close)
        self.ready: dict[str, Any] = self._answer()

    def ask(self, kind: str, tokens: int) -> Any:
        """Its answer to a request; pauses, so that no threads still spin beside another's turn."""
        assert self.process.stdin is not None
        time.sleep(_QUIET)
        try:
            self.process.stdin.write(f"{kind} {tokens}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; why, is seen where the answer is missing
        found = self._answer()
        time.sleep(_QUIET)
        return found

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"--peers: {self.name} failed: {last}")

    def close(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.communicate()


def peer_candidate(
    method: str, python: Path, float_model: Path, arguments: list[str], stack: ExitStack
) -> Candidate:
    """A toolkit's model, loaded and waiting.

    Args:
        float_model: directory that it loads.
        arguments: more of peer_model.py.
        stack: ends the process.
    """
    shared = [str(float_model), "--threads", str(torch.get_num_threads()), *arguments]
    peer = PeerProcess(method, python, shared, stack)
    return Candidate(
        name=method,
        turn=peer.ask,
        weight_bytes=lambda: peer.ask("weights", 0),
        load_seconds=peer.ready["load_seconds"],
        packages=peer.ready["packages"],
    )
