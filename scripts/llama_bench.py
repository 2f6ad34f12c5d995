"""llama.cpp as a candidate of bench_model.py: a turn is a run of its ``llama-bench``."""

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from model_candidates import Candidate

from ptq.errors import ConfigError

_STEPS = 8  # decoded tokens in a turn


class LlamaBench:
    """``llama-bench`` on one GGUF file; every turn loads the file anew, which is not timed.

    Raises:
        ConfigError: it cannot be run, or its output is not what is expected.
    """

    def __init__(self, binary: Path, gguf: Path) -> None:
        self.binary, self.gguf = binary, gguf
        self.first = self._run(["-p", "1", "-n", "0"])

    def turn(self, kind: str, tokens: int) -> float:
        """Seconds of a prompt, or of one of a few steps behind it."""
        if kind == "prefill":
            return 1e-9 * float(self._run(["-p", str(tokens), "-n", "0"])["avg_ns"])
        found = self._run(["-p", "0", "-n", str(_STEPS), "-d", str(tokens)])
        return 1e-9 * float(found["avg_ns"]) / _STEPS

    def _run(self, test: list[str]) -> dict[str, Any]:
        """What it says of one test, repeated once."""
        command = [str(self.binary), "-m", str(self.gguf), "-t", str(torch.get_num_threads())]
        command += ["-r", "1", "-o", "json", *test]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            (found,) = json.loads(done.stdout)
            assert isinstance(found, dict) and {"avg_ns", "model_size"} <= found.keys()
        except (OSError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"--llama-bench {self.binary}: {error}; give a llama.cpp of 2025 or newer, whose "
                f"llama-bench has -d, and a GGUF file ({self.gguf})"
            ) from None
        return found


def llama_candidate(binary: Path, gguf: Path) -> Candidate:
    """llama.cpp with one file. The file's name tells its quantization."""
    bench = LlamaBench(binary, gguf)
    build = f"{bench.first.get('build_number')} ({bench.first.get('build_commit')})"
    return Candidate(
        name=f"llama.cpp {gguf.stem}",
        turn=bench.turn,
        weight_bytes=lambda: int(bench.first["model_size"]),
        load_seconds=None,
        packages={"llama.cpp": build},
    )
