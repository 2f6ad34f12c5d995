#!/usr/bin/env python
"""Time whole quantized models against the float model: prefill, decoding, loading, memory.

Prefill is one forward pass over a prompt; decode is one step with a key-value cache behind a
prompt. A ratio above 1 means faster than float; the spread is the 10th to 90th percentile of the
turns. Loading is from safetensors files that the system has in memory, to a model that can run;
what quantizes as it loads (the peers) begins with the float model's files. Weights are the bytes of
all tensors that a model holds after its turns, the kernels' own forms included.

All models take their turns one after the other, so a machine that slows down slows all of them.
ptq's are in this process; each of --peers is in one of its own, idle between its turns; llama.cpp
is a run of llama-bench.
"""

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from arguments import command_line, model_parser
from figures import write_figures
from llama_bench import llama_candidate
from model_candidates import (
    RANDOM,
    Candidate,
    Request,
    float_candidate,
    quantized_candidate,
    random_model,
)
from peer_process import METHODS, peer_candidate, peer_methods
from racing import compared, race, speeds

from ptq.command import output_file, positive, run_command
from ptq.errors import ConfigError
from ptq.model import resolve_device
from ptq.report import Console, environment

SCHEMES = ("w8a8", "w8a16", "w4a16-g64", "w4a16-g64-asym", "w4a8-g64")
BASES = ("bfloat16", "float32")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--random", choices=RANDOM, help="random weights in place of --model")
    parser.add_argument("--device", default="cpu", help="of ptq's models and the float ones")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--recipes", nargs="+", type=yaml.safe_load, default=["rtn"],
                        metavar="YAML", help="of each scheme (default: rtn)")  # fmt: skip
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES,
                        help="float models to compare with")  # fmt: skip
    parser.add_argument("--dtype", choices=BASES, default="bfloat16",
                        help="of what stays float in the quantized models")  # fmt: skip
    parser.add_argument("--head", metavar="SCHEME",
                        help="quantize the output head too; the peers' as well")  # fmt: skip
    parser.add_argument("--embeddings", metavar="SCHEME",
                        help="quantize ptq's embeddings and a head tied to them")  # fmt: skip
    parser.add_argument("--tune", nargs="?", type=float, const=0.6, metavar="MEMORY",
                        help="call ptq.tune first (default of MEMORY: 0.6)")  # fmt: skip
    parser.add_argument("--peers", nargs="+", type=peer_argument, default=[], metavar="NAME=PYTHON",
                        help="other toolkits: " + ", ".join(METHODS))  # fmt: skip
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="of llama.cpp's program")
    parser.add_argument("--gguf", nargs="+", type=Path, default=[], metavar="FILE",
                        help="what --llama-bench runs")  # fmt: skip
    parser.add_argument(
        "--prefill", nargs="+", type=positive, default=(16, 64, 128, 512), metavar="T"
    )
    parser.add_argument("--decode-after", type=positive, default=128, metavar="T",
                        help="tokens before the decoded one (default: 128)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=20, help="for each row of the table")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    options.command = command_line(__file__, arguments)
    return options


def peer_argument(text: str) -> list[tuple[str, Path]]:
    """Peers, or the parser's error."""
    try:
        return peer_methods(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build(
    options: argparse.Namespace, work: Path, stack: ExitStack, console: Console
) -> list[Candidate]:
    """All that take turns, loaded; they keep nothing in ``work``."""
    import ptq

    device = resolve_device(options.device)
    source, longest = work / "float", max(*options.prefill, options.decode_after)
    if options.random:
        random_model(options.random, options.dtype, source)
    else:
        ptq.load_float(options.model, dtype=options.dtype)[0].save_pretrained(source)
    request = Request(
        options.dtype, options.head, options.embeddings, options.tune, longest, device
    )
    made = [float_candidate(source, base, longest, device) for base in options.bases]
    for scheme, recipe in product(options.schemes, options.recipes):
        console.stage(scheme)
        made.append(quantized_candidate(source, scheme, recipe, request, console))
    words = ["--longest", str(longest), "--dtype", options.dtype]
    words += ["--head"] if options.head else []
    for method, python in (peer for group in options.peers for peer in group):
        console.stage(method)
        made.append(peer_candidate(method, python, source, words, stack))
    return made + [llama_candidate(options.llama_bench, file) for file in options.gguf]


def tasks(options: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Name, kind and tokens of each row of the table."""
    prompts = [(f"prefill {tokens}", "prefill", tokens) for tokens in options.prefill]
    return [*prompts, ("decode", "decode", options.decode_after)]


def bench(options: argparse.Namespace, console: Console) -> None:
    if bool(options.gguf) != (options.llama_bench is not None):
        raise ConfigError("--llama-bench PATH and --gguf FILE go together")
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        with TemporaryDirectory() as work:
            candidates = build(options, Path(work), stack, console)
        for task, kind, tokens in tasks(options):
            console.stage(task)
            turns = {c.name: partial(c.turn, kind, tokens) for c in candidates}
            race(turns, 0, turns=2)  # does not count: kernels are prepared, caches filled
            times = race(turns, options.seconds)
            for name in times:
                row = {"task": task, "name": name, **compared(times, name, options.bases)}
                rows.append(row)
                console.say(f"{name:20} {speeds(row)}")
        models = [described(candidate) for candidate in candidates]
    console.stage("models")
    for model in models:
        seconds = "" if model["load_seconds"] is None else f"{model['load_seconds']:7.2f} s to load"
        console.say(f"{model['name']:20} {model['weight_bytes'] / 1e6:9.1f} MB {seconds}")
    if options.json:
        document = {
            "model": f"random weights, {options.random}" if options.random else options.model,
            "command": options.command, "bases": options.bases, "head": options.head,
            "embeddings": options.embeddings, "tune": options.tune,
            "decode_after": options.decode_after,
            "environment": environment(), "models": models, "rows": rows,
        }  # fmt: skip
        write_figures(options.json, document)


def described(candidate: Candidate) -> dict[str, Any]:
    """What is said of a model beside its times."""
    return {
        "name": candidate.name,
        "load_seconds": candidate.load_seconds,
        "weight_bytes": candidate.weight_bytes(),
        "packages": candidate.packages,
        **candidate.more,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: bench(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
