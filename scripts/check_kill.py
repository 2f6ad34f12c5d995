#!/usr/bin/env python
"""Kill the writing of a checkpoint over an old one, at random times, and look at what is there.

A child process saves a model over a checkpoint; it gets SIGKILL at a random moment between the
beginning of the save and its usual end. Then the directory must load, and every byte of it must be
that of the old checkpoint or that of the new one. After a save that is left to end, nothing else
may lie beside it.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from arguments import script_parser
from torch import nn

import ptq
from ptq.checkpoint import load, save, verify_bytes
from ptq.command import positive, run_command
from ptq.errors import PTQError
from ptq.report import Console

WIDTH, LAYERS = 1024, 24


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--kills", type=positive, default=20, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--write", nargs=2, metavar=("DIR", "WHICH"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def float_model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def write(directory: str, which: str) -> None:
    """What the child does: it says when it begins and when it is done."""
    torch.manual_seed(len(which))
    model = float_model()
    ptq.quantize(model, "w8a8", console=Console("quiet"))
    print("begin", flush=True)
    files = {"which": which}
    save(model, directory, overwrite=True, shard_bytes=2 * WIDTH * WIDTH, extra_files=files)
    print("done", flush=True)


def start(target: Path, which: str) -> subprocess.Popen[str]:
    """A child that has just begun to save."""
    command = [sys.executable, __file__, "--write", str(target), which]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "begin\n"
    return child


def finish(child: subprocess.Popen[str]) -> float:
    """Seconds until the save was done."""
    begin = time.perf_counter()
    assert child.stdout is not None
    done, seconds = child.stdout.readline(), time.perf_counter() - begin
    if child.wait() != 0 or done != "done\n":
        raise PTQError("a save that was left alone failed")
    return seconds


def whole(target: Path) -> str:
    """Which checkpoint is there.

    Raises:
        PTQError: none, or a damaged one.
    """
    load(target, model=float_model())  # puts back what was on its way out
    problems = verify_bytes(target)
    if problems:
        raise PTQError(f"after a kill: {problems[0]}")
    return (target / "which").read_text()


def check(kills: int, seed: int, console: Console) -> None:
    """Raises PTQError at the first kill that leaves something else."""
    chance, found, steps = random.Random(seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out"
        usual = min(finish(start(target, f"number {i}")) for i in range(2))
        for number in range(kills):
            old = whole(target)
            new = f"number {number + 2}"
            child = start(target, new)
            time.sleep(usual * (number + chance.random()) / kills)
            child.send_signal(signal.SIGKILL)
            child.wait()
            steps[f"{len(os.listdir(folder)) - target.exists()} siblings"] += 1
            there = whole(target)
            if there not in (old, new):
                raise PTQError(f"kill {number}: {there} is there, not {old} or {new}")
            found["old" if there == old else "new"] += 1
        finish(start(target, "last"))
        left = sorted(os.listdir(folder))
        if whole(target) != "last" or left != ["out"]:
            raise PTQError(f"after a save that was left alone: {left}")
    console.say(f"a save takes {usual:.2f} s; {kills} kills within it, seed {seed}: {dict(found)}")
    console.say(f"left beside the target by the kills: {dict(steps)}; after the next save: nothing")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    if options.write:
        return run_command(lambda: write(*options.write), console)
    return run_command(lambda: check(options.kills, options.seed, console), console)


if __name__ == "__main__":
    sys.exit(main())
