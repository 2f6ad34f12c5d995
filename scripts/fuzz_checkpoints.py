#!/usr/bin/env python
"""Damage tiny checkpoints of every format at random, and load them.

What loads, or is refused with a PTQError of one line, is as it should be. Any other error, and a
load of more than ten seconds of processor time, is a finding: it is printed with its traceback, and
the damaged directory is kept. from_pretrained reads files before ptq sees them: there only an error
from ptq's own code counts.
"""

import argparse
import copy
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import torch
from arguments import script_parser
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import ptq
from ptq.checkpoint import convert, save, verify_bytes
from ptq.command import positive, run_command
from ptq.errors import PTQError
from ptq.report import Console

SECONDS = 10
MEMORY = 4_000_000_000
OWN = str(Path(ptq.__file__).parent)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--minutes", type=positive, default=10, help="default: 10")
    parser.add_argument("--tries", type=positive, help="instead of the minutes: so many")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-findings"), help="where damaged directories go"
    )
    return parser.parse_args(arguments)


def make_seeds(folder: Path) -> dict[str, Path]:
    """A whole checkpoint of each format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    quiet = Console("quiet")
    schemes = ["w8a8", "w4a16-g32-asym", "w4a16-g32", "w8a8-static", "fp8"]
    models: dict[str, Any] = {}
    for scheme in schemes:
        models[scheme] = LlamaForCausalLM(copy.deepcopy(config)).eval()
        data = [torch.arange(16).reshape(1, 16)]
        ptq.quantize(models[scheme], scheme, calibration=data, console=quiet)
    seeds = {}
    for scheme in ("w8a8", "w4a16-g32-asym", "w8a8-static", "fp8"):
        seeds[f"ptq {scheme}"] = folder / scheme
        save(models[scheme], folder / scheme)
    seeds["ptq sharded"] = folder / "sharded"
    save(models["w4a16-g32-asym"], folder / "sharded", shard_bytes=20_000)
    seeds["save_pretrained"] = folder / "embedded"
    ptq.load(folder / "w8a8").save_pretrained(folder / "embedded", max_shard_size="30KB")
    for scheme, kind in (
        ("w8a8", "compressed-tensors"),
        ("w8a8-static", "compressed-tensors"),
        ("w4a16-g32-asym", "compressed-tensors"),
        ("w4a16-g32", "gptq"),
        ("w4a16-g32-asym", "gptq-v2"),
        ("w4a16-g32-asym", "awq"),
    ):
        source = folder / scheme
        if not source.exists():
            save(models[scheme], source)
        seeds[f"{kind} {scheme}"] = folder / f"{kind}-{scheme}"
        convert(source, folder / f"{kind}-{scheme}", kind, engine="transformers")
    return seeds


def loads(root: Path) -> None:
    ptq.load(root)


def loads_unverified(root: Path) -> None:
    ptq.load(root, verify=False)


def verifies(root: Path) -> None:
    verify_bytes(root)


def from_pretrained(root: Path) -> None:
    """Of transformers' own errors none is a finding."""
    try:
        AutoModelForCausalLM.from_pretrained(root, local_files_only=True)
    except PTQError:
        raise
    except Exception as error:  # transformers may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if last.startswith(OWN) or isinstance(error, TimeoutError):
            raise
        raise PTQError(f"transformers: {type(error).__name__}") from error


READERS: tuple[Callable[[Path], None], ...] = (loads, loads_unverified, verifies, from_pretrained)


def stop(*_: object) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def attempt(reader: Callable[[Path], None], root: Path) -> tuple[str, str | None]:
    """What came of it, and the traceback of a finding."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader(root)
    except PTQError as error:
        refused = "by transformers" if str(error).startswith("transformers: ") else "refused"
        return refused, "of two lines" if "\n" in str(error) else None
    except Exception:  # any other error is what is looked for
        return "finding", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "loaded", None


def fuzz(options: argparse.Namespace, console: Console) -> int:
    """The number of findings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    signal.signal(signal.SIGPROF, stop)
    counts: Counter[tuple[str, str]] = Counter()
    findings: Counter[str] = Counter()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        seeds = make_seeds(Path(folder))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
        end, number = time.monotonic() + 60 * options.minutes, 0
        while number < options.tries if options.tries else time.monotonic() < end:
            number += 1
            name = chance.choice(list(seeds))
            root = Path(folder) / "it"
            shutil.copytree(seeds[name], root)
            said = mutations.damage(root, chance)
            for reader in READERS if "-" not in name.split()[0] else READERS[:2]:
                came, found = attempt(reader, root)
                counts[reader.__name__, came] += 1
                if found is not None:
                    where = " < ".join(found.splitlines()[-1:] + found.splitlines()[-3:-1])
                    findings[where] += 1
                    if findings[where] == 1:
                        console.say(f"finding: {reader.__name__}, {name}, {said[:300]}\n{found}")
                        kept = options.keep / f"{options.seed}-{number}"
                        shutil.copytree(root, kept, dirs_exist_ok=True)
            shutil.rmtree(root)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    console.say(f"{number} damaged directories of {len(seeds)} kinds")
    for (reader, came), count in sorted(counts.items()):
        console.say(f"  {reader:17} {came:15} {count}")
    console.say(f"{len(findings)} findings")
    for where, count in findings.most_common():
        console.say(f"  {count:5} {where}")
    return len(findings)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    found: list[int] = []
    status = run_command(lambda: found.append(fuzz(options, console)), console)
    return status or (1 if found[0] else 0)


if __name__ == "__main__":
    sys.exit(main())
