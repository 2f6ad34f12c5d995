#!/usr/bin/env python
"""Compare schemes and recipes on one model and one text: perplexity ratio, divergence, time, size.

The float model runs once and its logits wait on disk (TMPDIR; about 100 MB a window of 512 tokens
for a vocabulary of 49,152); then each scheme with each recipe, and each configuration file,
quantizes a fresh copy. Of a file only scheme, rules, recipe and tied_embeddings count: model and
texts are this command's, the same for all. --peers quantizes the same model with other toolkits,
each in its own environment and on the same tokens, and evaluates their weights with the same code.
Prints a Markdown table; with --json, rows that are measured later are added to the file.
"""

import argparse
import copy
import json
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peers
import yaml
from arguments import model_parser
from figures import protocol_line, ratio_cell, write_figures

from ptq.calibrate import TokenSet, calibration_tokens, overlap
from ptq.command import output_file, positive, run_command
from ptq.config import CalibrationConfig, as_config, load_config
from ptq.errors import CalibrationError, ConfigError
from ptq.recipe import make_recipe
from ptq.report import Console, environment, peak_memory_bytes

SCHEMES = ("w8a16", "w8a8", "w4a16-g64", "w4a16-g64-asym", "w4a8-g64")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = model_parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["calibration_data/evaluation.jsonl"])
    parser.add_argument("--calibration", help="text for schemes with static activations")
    parser.add_argument(
        "--samples", type=positive, default=64, help="calibration samples (default: 64)"
    )
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument(
        "--recipes",
        nargs="+",
        type=recipe,
        default=[["rtn"]],
        metavar="YAML",
        help="as in a configuration: rtn, auto, '[gptq, learned_rounding]' (default: rtn)",
    )
    parser.add_argument(
        "--configs", nargs="+", default=[], metavar="FILE", help="configuration files to add"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        type=peer_argument,
        default=[],
        metavar="NAME=PYTHON",
        help="other toolkits, for each of --schemes; names: " + ", ".join(peers.NAMES),
    )
    parser.add_argument(
        "--peer-iterations", type=positive, default=100, help="of auto-round (default: 100)"
    )
    parser.add_argument("--windows", type=positive, default=16)
    parser.add_argument("--context", type=positive, default=512)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the float model"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures here")
    return parser.parse_args(arguments)


def peer_argument(text: str) -> peers.Peer:
    """A peer, or the parser's error."""
    try:
        return peers.peer(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def recipe(text: str) -> Any:
    """A recipe in YAML."""
    return yaml.safe_load(text)


def candidates(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """A name and the configuration of each row."""
    made: list[tuple[str, dict[str, Any]]] = [
        (scheme, {"scheme": scheme, "recipe": steps} | head_of_its_own(scheme, steps))
        for scheme in options.schemes
        for steps in options.recipes
    ]
    for file in options.configs:
        loaded = load_config(file)
        config = loaded.model_dump(mode="json", include={"scheme", "rules", "recipe"})
        if loaded.tied_embeddings == "untie":
            config["tied_embeddings"] = "untie"
        made.append((Path(file).name, config))
    for _, config in made:
        if options.calibration:
            config["calibration"] = {
                "data": options.calibration,
                "samples": options.samples,
                "sequence_length": options.context,
            }
    return made


def head_of_its_own(scheme: str, steps: Any) -> dict[str, Any]:
    """The key that a recipe needs which gives a tied output head a weight of its own."""
    config = as_config({"scheme": scheme, "recipe": steps})
    unties = make_recipe(config.recipe, config.scheme).unties
    return {"tied_embeddings": "untie"} if unties else {}


def bench(options: argparse.Namespace, console: Console) -> None:
    import ptq
    from ptq.calibrate import evaluation_windows
    from ptq.config import EvaluationConfig
    from ptq.evaluation import ReferenceLogits, compare

    if options.peers and not options.calibration:
        raise CalibrationError("--peers need --calibration FILE")
    console.stage("load")
    model, tokenizer = ptq.load_float(options.model, dtype=options.dtype)
    section = EvaluationConfig(data=options.data, windows=options.windows, context=options.context)
    tokens = evaluation_windows(section, tokenizer)
    refuse_overlap(options, tokens, tokenizer)
    rows: list[dict[str, Any]] = []
    with ReferenceLogits() as reference:
        console.stage("float model")
        reference.record(model, tokens.sequences, console.bar("window"))

        def measure(candidate: Any, row: dict[str, Any]) -> None:
            found = compare(candidate, tokens, reference, progress=console.bar("window"))
            rows.append({**row, "environment": environment(), **found.to_dict()})
            console.say(found)
            if options.json:
                keep(options.json, options.model, rows[-1])

        for name, config in candidates(options):
            console.stage(f"{name} {config['recipe']}")
            measure(*ours(model, tokenizer, name, config, console))
        with TemporaryDirectory() as work:
            if options.peers:
                peers.prepare(Path(work), model, tokenizer, calibration(options, tokenizer))
            for other, scheme in product(options.peers, options.schemes):
                console.stage(f"{scheme} {other.name}")
                measure(*theirs(model, Path(work), other, scheme, options))
    console.say("\n" + table(rows))


def ours(
    model: Any, tokenizer: Any, name: str, config: dict[str, Any], console: Console
) -> tuple[Any, dict[str, Any]]:
    """A quantized copy of the model, and what its row says of how it was made."""
    import ptq

    candidate = copy.deepcopy(model)
    start = time.perf_counter()
    result = ptq.quantize(candidate, config, tokenizer=tokenizer, console=console)
    return candidate, {
        "name": name,
        "scheme": str(result.config.scheme),
        "recipe": result.recipe,
        "seconds": time.perf_counter() - start,
        "tensor_bytes": result.plan.bytes_after,
        "peak_memory_bytes": peak_memory_bytes(),
        "config": config,
    }


def theirs(
    model: Any, work: Path, other: peers.Peer, scheme: str, options: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """The same of another toolkit."""
    import ptq

    candidate, figures = peers.quantize(other, work, model, scheme, options.peer_iterations)
    steps = other.name
    if other.name == "auto-round":
        steps = f"{steps} ({options.peer_iterations} iterations)"
    config = {"scheme": scheme, "recipe": steps, "samples": options.samples}
    size = ptq.plan(model, scheme).bytes_after
    row = {"name": other.name, "scheme": scheme, "recipe": steps, "tensor_bytes": size}
    return candidate, {**row, **figures, "config": config}


def calibration(options: argparse.Namespace, tokenizer: Any) -> TokenSet:
    """The tokens that every candidate looks at."""
    section = CalibrationConfig(
        data=[options.calibration],
        samples=options.samples,
        sequence_length=options.context,
    )
    return calibration_tokens(section, tokenizer)


def refuse_overlap(options: argparse.Namespace, tokens: TokenSet, tokenizer: Any) -> None:
    """Figures on calibration text are worth nothing."""
    if not options.calibration:
        return
    shared = overlap(calibration(options, tokenizer), tokens)
    if shared > 0:
        raise CalibrationError(
            f"calibration and evaluation text overlap: {shared:.0%} of {', '.join(options.data)} "
            f"is in {options.calibration}; give other text"
        )


def keep(path: Path, model: str, row: dict[str, Any]) -> None:
    """Add a row to the file; one of the same scheme, recipe and texts is replaced."""
    document: dict[str, Any] = {"model": model, "rows": []}
    if path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
    same = ("name", "config", "protocol")
    rows = [r for r in document["rows"] if any(r[key] != row[key] for key in same)]
    document["rows"] = [*rows, json.loads(json.dumps(row))]
    write_figures(path, document)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| scheme | recipe | perplexity ratio [95%] | KL mean | top-1 agreement | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['scheme']} | {r['recipe']} "
        f"| {ratio_cell(r)} | {r['kl_mean']:.4f} "
        f"| {100 * r['top1_agreement']:.1f}% | {r['seconds']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n\n" + protocol_line(rows[0])


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console()
    return run_command(lambda: bench(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
