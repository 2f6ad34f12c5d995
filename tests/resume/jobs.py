"""Very small jobs, and a script that kills one: ``python -m tests.resume.jobs FOLDER KIND``."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ptq.config import QuantizationConfig, as_config
from ptq.pipeline import run
from ptq.report import Console, Report
from ptq.resume import work, work_root
from tests.tiny import WORDS, tiny_text, tiny_tokenizer

BLOCKS = 3
FILES = ("model.safetensors", "config.json")
LEARNED = {"name": "learned_rounding", "options": {"iterations": 4, "sequences": 2}}
PERMUTED = {"name": "gptaq", "options": {"act_order": "permuted"}}
TURNED = {"name": "rotation", "options": {"gain": 0.0}}
MERGED = {"recipe": ["residual_rotation", "gptq"], "scheme": "w8a8", "tied_embeddings": "untie"}
KINDS: dict[str, dict[str, Any]] = {
    "loaded": {},
    "streamed": {"stream": True},
    "distilled": {"recipe": [PERMUTED, LEARNED, "distill"], "scheme": "w4a8-g16"},
    "rotated": {"recipe": [TURNED, "gptq"], "scheme": "w8a8"},
    "rotated, streamed": {"recipe": [TURNED, "gptq"], "scheme": "w8a8", "stream": True},
    "rotated, distilled": {"recipe": [TURNED, "gptq", "distill"], "scheme": "w4a8-g16"},
    "merged": MERGED,
    "merged, streamed": {**MERGED, "stream": True},
}
"""What the jobs are, beside the usual."""


def make_model(folder: Path, kind: type[PretrainedConfig] = LlamaConfig, **more: Any) -> None:
    """A model of three blocks, and text."""
    torch.manual_seed(0)
    config = kind(
        hidden_size=16, intermediate_size=32, num_hidden_layers=BLOCKS, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(WORDS), max_position_embeddings=64,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None, **more,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(tiny_text(300, seed=1))


def job(folder: Path, output: str, **more: Any) -> QuantizationConfig:
    stream = more.pop("stream", False)
    section = {"data": str(folder / "text.txt"), "samples": 3, "sequence_length": 16}
    base = {
        "model": {"id": str(folder / "model"), "stream": stream},
        "scheme": "w8a16",
        "recipe": ["smoothquant", "gptaq"],
        "calibration": section,
        "output": str(folder / output),
    }
    return as_config(base | more)


def done(config: QuantizationConfig) -> Report:
    return run(config, console=Console("quiet"))


def result(folder: Path, output: str) -> dict[str, bytes]:
    """The bytes that must not depend on how often the run was killed."""
    return {name: (folder / output / name).read_bytes() for name in FILES}


def kill_ten_times(folder: Path, kind: str) -> None:
    """Kill the job of this kind at ten random times, then let it end; prints how long tries lived.

    A job that ends before it is killed is left, and another one begun. Each try is a fork of this
    process, which has everything imported.
    """
    chance = random.Random(0)
    start = time.perf_counter()
    _end_or_kill(job(folder, "whole", **KINDS[kind]), None)
    whole = time.perf_counter() - start
    killed, number = 0, 0
    while killed < 10:
        lived = chance.uniform(0.1, 0.7) * whole
        if _end_or_kill(job(folder, f"killed-{number}", **KINDS[kind]), lived):
            number += 1
        else:
            killed += 1
            print(f"killed after {lived:.2f} of {whole:.2f} s", flush=True)  # forks would again
    _end_or_kill(job(folder, f"killed-{number}", **KINDS[kind]), None)


def _end_or_kill(config: QuantizationConfig, lives: float | None) -> bool:
    """Whether the job ended by itself."""
    child = os.fork()
    if child == 0:
        work.SHARE = 1e9  # keep all progress, however little time there is between
        done(config)
        os._exit(0)
    if lives is not None:
        time.sleep(lives)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    assert config.output is not None
    return not work_root(config.output.dir).exists()  # or killed when there was nothing left to do


if __name__ == "__main__":
    kill_ten_times(Path(sys.argv[1]), sys.argv[2])
