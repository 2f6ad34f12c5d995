#!/usr/bin/env python
"""Load a quantized checkpoint and the float one, in fresh processes, and report time and memory.

The float checkpoint is what save_pretrained writes of the float model in bfloat16. Loads take
turns; medians are reported. transformers maps float weights and reads them when they are first
used, so the time until the first token's logits is given as well, and ``cold`` drops the files from
the page cache before each load (Linux). Memory is the largest resident set beyond that after the
imports.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arguments import command_line, model_parser

from ptq.command import output_file, positive, run_command
from ptq.report import Console

READERS = ("ptq.load", "from_pretrained", "float")
FIGURES = ("load_s", "first_s", "load_cpu_s", "first_cpu_s", "load_mb", "first_mb")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--scheme", default="w8a8", help="default: w8a8")
    parser.add_argument("--repeats", type=positive, default=9, help="default: 9")
    parser.add_argument("--cold", action="store_true", help="files not in memory beforehand")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures there")
    parser.add_argument("--once", nargs=2, metavar=("READER", "DIR"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def memory_mb(key: str) -> float:
    """Of this process: VmRSS (resident now) or VmHWM (the most so far)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) / 1000


def once(reader: str, directory: str) -> None:
    """What a process of its own does: load, compute one token's logits, print the figures."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import ptq
    import ptq.checkpoint
    from ptq.checkpoint.from_config import load_config
    from ptq.model import named_class

    logging.disable_progress_bar()
    assert named_class(load_config(Path(directory))) is not None  # and the class is imported
    before, start, cpu = memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    if reader == "ptq.load":
        model: Any = ptq.load(directory)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    found = {
        "load_s": time.perf_counter() - start,
        "load_cpu_s": time.process_time() - cpu,
        "load_mb": memory_mb("VmHWM") - before,
    }
    with torch.no_grad():
        model(torch.tensor([[1]]))
    found |= {
        "first_s": time.perf_counter() - start,
        "first_cpu_s": time.process_time() - cpu,
        "first_mb": memory_mb("VmHWM") - before,
    }
    print(json.dumps(found))


def drop_from_memory(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def make(model: str, scheme: str, folder: Path) -> dict[str, Path]:
    """The float checkpoint and the quantized one; returns what each reader loads."""
    import torch

    import ptq

    made, _ = ptq.load_float(model)
    made.to(torch.bfloat16)
    made.save_pretrained(folder / "float")
    ptq.quantize(made, scheme, console=Console("quiet"))
    ptq.save(made, folder / "quantized")
    return {name: folder / ("float" if name == "float" else "quantized") for name in READERS}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians by reader, and the size of the weight files."""
    places = make(options.model, options.scheme, folder)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
    for _ in range(options.repeats):
        for name, place in places.items():
            if options.cold:
                drop_from_memory(place)
            command = [sys.executable, __file__, "--once", name, str(place)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout))
    return {
        name: {
            "file_mb": sum(p.stat().st_size for p in places[name].glob("*.safetensors")) / 1e6,
            **{key: statistics.median(run[key] for run in found) for key in FIGURES},
            "load_s_spread": [min(r["load_s"] for r in found), max(r["load_s"] for r in found)],
        }
        for name, found in runs.items()
    }


def bench(options: argparse.Namespace, console: Console, command: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    console.say(f"{'':16}{'files':>8}{'load':>8}{'first':>8}{'cpu':>7}{'cpu':>7}{'MB':>7}{'MB':>7}")
    for name, row in rows.items():
        console.say(
            f"{name:16}{row['file_mb']:6.1f}MB{row['load_s']:7.2f}s{row['first_s']:7.2f}s"
            f"{row['load_cpu_s']:6.2f}s{row['first_cpu_s']:6.2f}s"
            f"{row['load_mb']:7.0f}{row['first_mb']:7.0f}"
        )
    if options.json:
        made = {"command": command, "threads": os.environ.get("OMP_NUM_THREADS"), "rows": rows}
        options.json.write_text(json.dumps(made, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    if options.once:
        return run_command(lambda: once(*options.once), console)
    command = command_line(__file__, arguments)
    return run_command(lambda: bench(options, console, command), console)


if __name__ == "__main__":
    sys.exit(main())
